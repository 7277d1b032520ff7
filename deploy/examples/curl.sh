#!/bin/sh
# The API with nothing but curl. BASE is the router, MODEL the name it serves.
set -eu
BASE=${BASE:-http://127.0.0.1:8000}
MODEL=${MODEL:-baton-demo}

echo "# models"
curl -sS "$BASE/v1/models"
echo
echo "# chat"
curl -sS "$BASE/v1/chat/completions" -H 'Content-Type: application/json' \
    -d '{"model": "'"$MODEL"'", "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 32}'
echo
echo "# completion, streamed"
curl -sSN "$BASE/v1/completions" -H 'Content-Type: application/json' \
    -d '{"model": "'"$MODEL"'", "prompt": "Once upon a time", "max_tokens": 16, "temperature": 0, "stream": true}'
echo "# Anthropic messages"
curl -sS "$BASE/v1/messages" -H 'Content-Type: application/json' -H 'anthropic-version: 2023-06-01' \
    -d '{"model": "'"$MODEL"'", "max_tokens": 32, "messages": [{"role": "user", "content": "Hello!"}]}'
echo

"""`baton chat`: a conversation over the router's HTTP API, streamed to the terminal."""

from __future__ import annotations

import http.client
import json
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

from core.errors import Unavailable
from deploy.client import open_url

BROKE_OFF = "the answer broke off: the router ended, or is being restarted"

DIM, PLAIN = "\x1b[2m", "\x1b[0m"


def chat(base_url: str, model: str, api_key: str, *, max_tokens: int, is_thinking: bool) -> None:
    """Read lines until end of file or /exit. /new forgets the conversation."""
    print(f"{model} at {base_url}; /new starts over, /exit or Ctrl-D ends")
    messages: list[dict[str, str]] = []
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            print()
            return
        if line == "/exit":
            return
        if line == "/new":
            messages.clear()
            continue
        if not line:
            continue
        messages.append({"role": "user", "content": line})
        body = {"model": model, "messages": messages, "max_tokens": max_tokens, "stream": True}
        body |= {"chat_template_kwargs": {"thinking": is_thinking}}
        try:
            messages.append({"role": "assistant", "content": _answer(base_url, api_key, body)})
        except Unavailable as error:
            messages.pop()
            print(f"baton: {error}", file=sys.stderr)


def _answer(base_url: str, api_key: str, body: dict[str, Any]) -> str:
    """Print the answer as it comes, thoughts dimmed; returns its text. Raises Unavailable with the server's words."""
    content: list[str] = []
    dimmed = sys.stdout.isatty()
    for delta in _deltas(base_url, api_key, body):
        if thought := delta.get("reasoning_content"):
            print(f"{DIM}{thought}{PLAIN}" if dimmed else thought, end="", flush=True)
        if text := delta.get("content"):
            content.append(text)
            print(text, end="", flush=True)
    print()
    return "".join(content)


def _deltas(base_url: str, api_key: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {api_key}"} if api_key else {})
    request = urllib.request.Request(f"{base_url}/v1/chat/completions", json.dumps(body).encode(), headers)
    try:
        with open_url(request, 600.0) as response:
            for raw in response:
                line = raw.decode().strip()
                if line == "data: [DONE]":
                    return
                if not line.startswith("data: "):
                    continue
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    raise Unavailable(event["error"].get("message", "the stream ended with an error"))
                for choice in event.get("choices", ()):
                    yield choice.get("delta", {})
        raise Unavailable(BROKE_OFF)
    except urllib.error.HTTPError as error:
        hint = "; --api-key-file names a file with one" if error.code == 401 else ""
        raise Unavailable(f"{error.code}: {_sentence(error.read())}{hint}") from error
    except http.client.IncompleteRead as error:
        raise Unavailable(BROKE_OFF) from error
    except (urllib.error.URLError, OSError) as error:
        raise Unavailable(f"{base_url} cannot be reached: {error}") from error


def _sentence(body: bytes) -> str:
    """The message of an error body, or its beginning if it is none of ours."""
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body.decode(errors="replace")[:500]

"""Chat through the official OpenAI client (`pip install openai`), streamed, with the usage at the end.

    python deploy/examples/chat.py [--base-url URL] [--model NAME] "What is 2 plus 3?"

The demo model knows its own small world only: deploy/demo_model/README.md says what to ask it.
"""

import argparse

from openai import OpenAI


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--model", default="baton-demo")
    parser.add_argument("--api-key", default="none")
    parser.add_argument("question")
    options = parser.parse_args()

    with OpenAI(base_url=options.base_url, api_key=options.api_key) as client:
        stream = client.chat.completions.create(
            model=options.model,
            messages=[{"role": "user", "content": options.question}],
            max_tokens=64,
            stream=True,
            stream_options={"include_usage": True},
        )
        for chunk in stream:
            if chunk.choices:
                print(chunk.choices[0].delta.content or "", end="", flush=True)
            if chunk.usage:
                print(f"\n[{chunk.usage.prompt_tokens} prompt tokens, {chunk.usage.completion_tokens} generated]")


if __name__ == "__main__":
    main()

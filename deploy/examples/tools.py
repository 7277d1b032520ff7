"""Offer a tool through the official OpenAI client (`pip install openai`), run what the model calls, and give it the result.

    python deploy/examples/tools.py [--base-url URL] [--model NAME] "What is the weather in Paris?"

The demo model calls this tool for the cities it knows (deploy/demo_model/text.py); a plain answer is shown as it is.
"""

import argparse
import json

from openai import OpenAI

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Current weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--model", default="baton-demo")
    parser.add_argument("--api-key", default="none")
    parser.add_argument("question")
    options = parser.parse_args()

    messages = [{"role": "user", "content": options.question}]
    with OpenAI(base_url=options.base_url, api_key=options.api_key) as client:
        answer = client.chat.completions.create(model=options.model, messages=messages, tools=[WEATHER], max_tokens=128).choices[0].message
        if not answer.tool_calls:
            print(answer.content)
            return
        messages.append(answer.model_dump(exclude_none=True))
        for call in answer.tool_calls:
            print(f"the model calls {call.function.name}({call.function.arguments})")
            result = {"weather": "sunny, 21 degrees"}
            messages.append({"role": "tool", "tool_call_id": call.id, "content": json.dumps(result)})
        final = client.chat.completions.create(model=options.model, messages=messages, tools=[WEATHER], max_tokens=128)
        print(final.choices[0].message.content)


if __name__ == "__main__":
    main()

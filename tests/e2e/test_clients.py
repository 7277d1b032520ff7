"""The official clients against a router with one prefill and one decode rank: what users run."""

from __future__ import annotations

import json
from collections.abc import Iterator

import anthropic
import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from deploy.demo_model.text import PEOPLE, PLACES, THINGS
from tests.support.serving import Serving

pytestmark = pytest.mark.e2e

WEATHER = {
    "name": "get_weather",
    "description": "Get the weather of a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
HELLO = [{"role": "user", "content": "Hello!"}]
GREEDY = {"extra_body": {"temperature": 0}}
"""The Anthropic client has no such argument of its own any more."""

FACTS = "The code of the red fox of Anna is 4821. The dog slept near the river. The code of Ben is 1733."
FACT = f"{FACTS} The code of the red fox of Anna is"
FILLER = " ".join(
    f"{person} lost a green {thing} in the {place}." for person in PEOPLE[:10] for thing, place in zip(THINGS, PLACES, strict=True)
)


@pytest.fixture(scope="module")
def serving() -> Iterator[Serving]:
    with Serving() as serving:
        yield serving
        serving.wait(serving.is_empty)


@pytest.fixture(scope="module")
def client(serving: Serving) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{serving.url}/v1", api_key="none") as client:
        yield client


@pytest.fixture(scope="module")
def claude(serving: Serving) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=serving.url, api_key="none") as client:
        yield client


class TestOpenAI:
    def test_chat(self, client: openai.OpenAI) -> None:
        answer = client.chat.completions.create(model="demo", messages=HELLO, temperature=0)
        assert answer.choices[0].message.content == "Hello! How can I help you?"
        assert answer.choices[0].finish_reason == "stop"
        assert answer.usage.prompt_tokens + answer.usage.completion_tokens == answer.usage.total_tokens
        assert answer._request_id and answer.id == f"chatcmpl-{answer._request_id}"

    def test_streamed_chat_is_the_same_text(self, client: openai.OpenAI) -> None:
        options = {"include_usage": True}
        chunks = list(client.chat.completions.create(model="demo", messages=HELLO, temperature=0, stream=True, stream_options=options))
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert text == "Hello! How can I help you?"
        assert chunks[-1].usage.completion_tokens > 0
        assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"

    def test_continuous_usage_counts_every_token_of_a_stream(self, serving: Serving) -> None:
        body = {"model": "demo", "prompt": "The code of", "max_tokens": 20, "stream": True, "ignore_eos": True, "seed": 1}
        options = {"stream_options": {"continuous_usage_stats": True}}
        with serving.client.stream("POST", "/v1/completions", json=body | options) as response:
            events = [json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: {")]
        counts = [event["usage"]["completion_tokens"] for event in events]
        assert counts == sorted(counts) and counts[0] >= 1 and counts[-1] == 20
        assert events[-1]["choices"][0]["finish_reason"] == "length"
        plain = serving.client.post("/v1/completions", json=body | {"stream": False}).json()
        assert "".join(event["choices"][0]["text"] for event in events) == plain["choices"][0]["text"]

    def test_tool_call(self, client: openai.OpenAI) -> None:
        tools = [{"type": "function", "function": WEATHER}]
        question = [{"role": "user", "content": "What is the weather in Paris?"}]
        answer = client.chat.completions.create(model="demo", messages=question, tools=tools, temperature=0)
        (call,) = answer.choices[0].message.tool_calls
        assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "Paris"})
        assert answer.choices[0].finish_reason == "tool_calls"

    def test_streamed_tool_call(self, client: openai.OpenAI) -> None:
        tools = [{"type": "function", "function": WEATHER}]
        question = [{"role": "user", "content": "What is the weather in Rome?"}]
        stream = client.chat.completions.create(model="demo", messages=question, tools=tools, temperature=0, stream=True)
        parts = [call for chunk in stream for choice in chunk.choices for call in choice.delta.tool_calls or []]
        assert "".join(part.function.name or "" for part in parts) == "get_weather"
        assert json.loads("".join(part.function.arguments or "" for part in parts)) == {"city": "Rome"}

    def test_the_result_of_a_tool_is_put_into_words(self, client: openai.OpenAI) -> None:
        tools = [{"type": "function", "function": WEATHER}]
        messages: list[dict[str, object]] = [{"role": "user", "content": "What is the weather in Oslo?"}]
        answer = client.chat.completions.create(model="demo", messages=messages, tools=tools, temperature=0)
        (call,) = answer.choices[0].message.tool_calls
        messages.append(answer.choices[0].message.model_dump(exclude_none=True))
        messages.append({"role": "tool", "tool_call_id": call.id, "content": '{"weather": "rainy, 9 degrees"}'})
        answer = client.chat.completions.create(model="demo", messages=messages, tools=tools, temperature=0)
        assert answer.choices[0].message.content == "It is rainy in Oslo."
        assert answer.choices[0].finish_reason == "stop"

    @pytest.mark.parametrize("effort", ["low", "high", "max"])
    def test_thinking_comes_before_the_answer_and_apart_from_it(self, client: openai.OpenAI, effort: str) -> None:
        question = [{"role": "user", "content": f"{FACTS} What is the code of the red fox of Anna?"}]
        thinking = {"chat_template_kwargs": {"thinking": True}}
        answer = client.chat.completions.create(
            model="demo", messages=question, temperature=0, reasoning_effort=effort, extra_body=thinking
        )
        assert answer.choices[0].message.reasoning_content == "I look for the code of the red fox of Anna."
        assert answer.choices[0].message.content == "The code of the red fox of Anna is 4821."

    def test_a_fact_is_recalled_from_far_outside_the_window(self, client: openai.OpenAI) -> None:
        question = [{"role": "user", "content": f"{FACTS} {FILLER} What is the code of the red fox of Anna?"}]
        answer = client.chat.completions.create(model="demo", messages=question, temperature=0)
        assert answer.usage.prompt_tokens > 1000
        assert answer.choices[0].message.content == "The code of the red fox of Anna is 4821."

    def test_chat_logprobs(self, client: openai.OpenAI) -> None:
        answer = client.chat.completions.create(model="demo", messages=HELLO, temperature=0, logprobs=True, top_logprobs=3, max_tokens=4)
        content = answer.choices[0].logprobs.content
        assert "".join(item.token for item in content) == answer.choices[0].message.content
        assert all(len(item.top_logprobs) == 3 and item.top_logprobs[0].logprob == pytest.approx(item.logprob) for item in content)

    def test_n_choices_differ_and_are_repeatable(self, client: openai.OpenAI) -> None:
        def texts() -> list[str]:
            answer = client.completions.create(model="demo", prompt="Once upon a time", n=3, seed=5, temperature=1.5, max_tokens=20)
            return [choice.text for choice in answer.choices]

        first = texts()
        assert first == texts()
        assert len(set(first)) == 3

    def test_completion_echo_scores_the_prompt(self, client: openai.OpenAI) -> None:
        prompt = "Once upon a time"
        answer = client.completions.create(model="demo", prompt=prompt, echo=True, logprobs=1, max_tokens=2, temperature=0)
        logprobs = answer.choices[0].logprobs
        assert answer.choices[0].text.startswith(prompt)
        assert "".join(logprobs.tokens) == answer.choices[0].text
        assert logprobs.token_logprobs[0] is None
        assert all(value <= 0 for value in logprobs.token_logprobs[1:])
        starts = [0]
        for token in logprobs.tokens[:-1]:
            starts.append(starts[-1] + len(token))
        assert logprobs.text_offset == starts

    def test_score_only(self, client: openai.OpenAI) -> None:
        answer = client.completions.create(model="demo", prompt="Once upon a time", echo=True, logprobs=0, max_tokens=0)
        assert answer.choices[0].text == "Once upon a time"
        assert answer.usage.completion_tokens == 0

    def test_stop_string_across_tokens_is_cut(self, client: openai.OpenAI) -> None:
        whole = client.completions.create(model="demo", prompt=FACT, max_tokens=4, temperature=0)
        assert whole.choices[0].text == " 4821."
        cut = client.completions.create(model="demo", prompt=FACT, max_tokens=12, temperature=0, stop=["82"])
        assert (cut.choices[0].text, cut.choices[0].finish_reason) == (" 4", "stop")

    def test_many_prompts_of_both_kinds(self, client: openai.OpenAI) -> None:
        answer = client.completions.create(model="demo", prompt=["Once", "One day"], n=2, max_tokens=3)
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
        answer = client.completions.create(model="demo", prompt=[[5, 6, 7], [8]], max_tokens=3)
        assert len(answer.choices) == 2

    def test_responses(self, client: openai.OpenAI) -> None:
        answer = client.responses.create(model="demo", input="Who are you?", temperature=0)
        assert answer.output_text == "I am the demo model of baton."
        events = list(client.responses.create(model="demo", input="Who are you?", temperature=0, stream=True))
        assert events[0].type == "response.created"
        assert events[-1].type == "response.completed"
        assert events[-1].response.output_text == answer.output_text

    def test_models(self, client: openai.OpenAI) -> None:
        assert [model.id for model in client.models.list()] == ["demo"]
        assert client.models.retrieve("demo").id == "demo"

    def test_errors_have_the_clients_own_classes(self, client: openai.OpenAI) -> None:
        with pytest.raises(openai.NotFoundError, match="does not exist"):
            client.chat.completions.create(model="other", messages=HELLO)
        with pytest.raises(openai.BadRequestError, match="temperature"):
            client.completions.create(model="demo", prompt="x", temperature=7)
        with pytest.raises(openai.BadRequestError, match="max_tokens"):
            client.completions.create(model="demo", prompt="x", max_tokens=10**6)


class TestAnthropic:
    def test_message(self, claude: anthropic.Anthropic) -> None:
        message = claude.messages.create(model="demo", max_tokens=30, messages=HELLO, **GREEDY)
        assert message.content[0].text == "Hello! How can I help you?"
        assert message.stop_reason == "end_turn"
        assert message.usage.input_tokens > 0

    def test_streamed_message(self, claude: anthropic.Anthropic) -> None:
        with claude.messages.stream(model="demo", max_tokens=30, messages=HELLO, **GREEDY) as stream:
            assert "".join(stream.text_stream) == "Hello! How can I help you?"
            assert stream.get_final_message().stop_reason == "end_turn"

    def test_tool_use(self, claude: anthropic.Anthropic) -> None:
        tool = {"name": "get_weather", "description": WEATHER["description"], "input_schema": WEATHER["parameters"]}
        question = [{"role": "user", "content": "What is the weather in London?"}]
        message = claude.messages.create(model="demo", max_tokens=80, messages=question, tools=[tool], **GREEDY)
        (use,) = [block for block in message.content if block.type == "tool_use"]
        assert (use.name, use.input) == ("get_weather", {"city": "London"})
        assert message.stop_reason == "tool_use"

    def test_max_tokens_and_stop_sequences(self, claude: anthropic.Anthropic) -> None:
        assert claude.messages.create(model="demo", max_tokens=2, messages=HELLO, **GREEDY).stop_reason == "max_tokens"
        message = claude.messages.create(model="demo", max_tokens=30, messages=HELLO, **GREEDY, stop_sequences=["can"])
        assert (message.content[0].text.rstrip(), message.stop_reason) == ("Hello! How", "stop_sequence")

    def test_count_tokens_and_errors(self, claude: anthropic.Anthropic) -> None:
        assert claude.messages.count_tokens(model="demo", messages=HELLO).input_tokens > 0
        with pytest.raises(anthropic.NotFoundError):
            claude.messages.create(model="other", max_tokens=5, messages=HELLO)
        with pytest.raises(anthropic.BadRequestError):
            claude.messages.create(model="demo", max_tokens=5, messages=[])


def test_metrics_parse_and_count_every_stage(serving: Serving) -> None:
    serving.complete(prompt="Once upon a time", max_tokens=4, ignore_eos=True)
    families = {family.name: family for family in text_string_to_metric_families(serving.client.get("/metrics").text)}
    stages = {sample.labels["stage"] for sample in families["baton_router_stage_seconds"].samples}
    assert stages >= {"queue", "reserve", "prefill", "transfer", "ready_wait", "decode"}
    for name in ("baton_router_ttft_seconds", "baton_router_itl_seconds"):
        count = next(sample.value for sample in families[name].samples if sample.name.endswith("_count"))
        assert count > 0, name
    for name in ("baton_rank_pages_free", "baton_rank_slots_free", "baton_rank_transfer_bytes", "baton_rank_transfer_seconds"):
        assert {sample.labels["rank"] for sample in families[name].samples} == {"prefill/0.0", "decode/0.0"}
    for member in serving.members.values():
        text = httpx.get(f"http://{member.metrics_address}/metrics", trust_env=False).text
        names = {family.name for family in text_string_to_metric_families(text)}
        assert f"baton_{member.role}_stage_seconds" in names


def test_the_interface_is_described(serving: Serving) -> None:
    assert serving.client.get("/docs").status_code == 200
    paths = serving.client.get("/openapi.json").json()["paths"]
    assert {"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"} <= set(paths)

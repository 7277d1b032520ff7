"""One answer of a model as the four dialects tell it."""

from __future__ import annotations

import asyncio
import json
import pathlib
from collections.abc import AsyncGenerator
from typing import Any, cast

import deepseek_recipe as recipe
import pytest
from prometheus_client import CollectorRegistry

from core.clock import SystemClock
from core.errors import InvalidRequest
from core.request import FinishReason, Request, TokenLogprobs
from router import completions
from router.chat import Chat, ChatFormat
from router.config import RouterConfig
from router.dialects import CHAT, MESSAGES, RESPONSES, Dialect
from router.metrics import RouterMetrics
from router.relay import Journey, Output, Relay
from router.service import Service
from router.tokens import TextCodec

MODEL = pathlib.Path(__file__).resolve().parents[3] / "deploy" / "demo_model" / "checkpoint"
CODEC = TextCodec(MODEL)
END = [json.loads((MODEL / "config.json").read_text())["eos_token_id"]]
LIKELY = (*CODEC.encode(" fox"), *CODEC.encode("\N{GRINNING FACE}")[:2])
"""The latter two are bytes of one character, and look alike."""
HELLO = [{"role": "user", "content": "Hello"}]
BODIES: dict[Dialect, dict[str, Any]] = {
    CHAT: {"messages": HELLO},
    RESPONSES: {"input": "Hello"},
    MESSAGES: {"messages": HELLO, "max_tokens": 400},
}


class Model:
    """In a relay's place: says the text, some tokens a time, and ends as it is told."""

    def __init__(self, text: str, ending: FinishReason, group: int = 1) -> None:
        self.token_ids = CODEC.encode(text) + (END if ending is FinishReason.STOP else [])
        self.ending, self.group = ending, group

    async def generate(self, request: Request, journey: Journey) -> AsyncGenerator[Output, None]:
        for start in range(0, len(self.token_ids), self.group):
            await asyncio.sleep(0)
            said, is_last = tuple(self.token_ids[start : start + self.group]), start + self.group >= len(self.token_ids)
            top = {} if not request.sampling.num_logprobs else {"top_ids": LIKELY, "top_logprobs": (-0.1, -0.2, -0.3)}
            scored = [TokenLogprobs(logprob=-0.5, **top) for _ in said] if request.sampling.num_logprobs is not None else []
            yield Output(token_ids=said, logprobs=tuple(scored), finish_reason=self.ending if is_last else None)


def new_service(model: Model, max_model_len: int = 4096) -> Service:
    relay = cast(Relay, model)
    return Service(RouterConfig(), "demo", max_model_len, CODEC, relay, RouterMetrics(CollectorRegistry(), "r"), SystemClock())


def new_chat(model: Model, dialect: Dialect, body: dict[str, Any]) -> Chat:
    service = new_service(model)
    form = ChatFormat(service, default_thinking=False)
    return Chat(service, form, dialect, form.parse({"model": "demo", **BODIES[dialect], **body}, dialect), "a")


def answer(model: Model, dialect: Dialect, **body: Any) -> dict[str, Any]:
    return asyncio.run(new_chat(model, dialect, body).response())


def events(model: Model, dialect: Dialect, **body: Any) -> list[dict[str, Any]]:
    async def read() -> list[bytes]:
        return [event async for event in new_chat(model, dialect, {**body, "stream": True}).events()]

    lines = [line for event in asyncio.run(read()) for line in event.splitlines() if line.startswith(b"data: {")]
    return [json.loads(line.removeprefix(b"data: ")) for line in lines]


def completed(model: Model, **body: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The choice's items, and the usage."""

    async def read() -> tuple[list[dict[str, Any]], dict[str, Any]]:
        service = new_service(model)
        parsed = completions.parse({"model": "demo", "prompt": "a", "max_tokens": 64, **body}, service)
        completion = completions.Completion(service, parsed, "a")
        return [item async for item in completion.choices()], completion.usage()

    return asyncio.run(read())


@pytest.mark.parametrize("ending", FinishReason)
@pytest.mark.parametrize("text", ["Hello there", "I look it up.</think>Hello there", ""])
def test_usage_counts_every_token_of_the_answer_the_one_that_ends_it_too_in_all_dialects(text: str, ending: FinishReason) -> None:
    model = Model(text or " ", ending)
    count, thinking = len(model.token_ids), {"chat_template_kwargs": {"thinking": "</think>" in text}}
    assert completed(model)[1]["completion_tokens"] == count
    for dialect, key in ((CHAT, "completion_tokens"), (RESPONSES, "output_tokens"), (MESSAGES, "output_tokens")):
        usage = answer(model, dialect, **thinking)["usage"]
        assert usage[key] == count, dialect.id_prefix
        options = {"stream_options": {"include_usage": True}} if dialect is CHAT else {}
        streamed = [event.get("response", event).get("usage") for event in events(model, dialect, **thinking, **options)]
        assert [found for found in streamed if found][-1] == usage, dialect.id_prefix


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize(("dialect", "key"), [(CHAT, "max_tokens"), (RESPONSES, "max_output_tokens"), (MESSAGES, "max_tokens")])
def test_an_answer_may_be_as_long_as_a_sequence_has_room(dialect: Dialect, key: str, thinking: bool) -> None:
    form = ChatFormat(new_service(Model(" ", FinishReason.STOP), max_model_len=2**20), default_thinking=thinking)
    assert form.parse({"model": "demo", **BODIES[dialect], key: 1_000_000}, dialect).sampling.max_tokens == 1_000_000


@pytest.mark.parametrize("extra", [{}, {"top_logprobs": 0}, {"top_logprobs": None}])
def test_a_response_has_the_log_probabilities_that_it_is_to_include(extra: dict[str, Any]) -> None:
    model = Model("Hello there", FinishReason.STOP)
    (message,) = answer(model, RESPONSES, include=["message.output_text.logprobs"], **extra)["output"]
    assert [found["logprob"] for found in message["content"][0]["logprobs"]] == [-0.5] * (len(model.token_ids) - 1)


@pytest.mark.parametrize(("count", "likely"), [(0, {}), (3, {" fox": -0.1, "\ufffd": -0.2})])
def test_completions_have_the_log_probability_of_the_token_itself_among_the_most_likely_ones(count: int, likely: dict[str, float]) -> None:
    items, _ = completed(Model("Hello there", FinishReason.LENGTH), logprobs=count)
    tokens = [token for item in items for token in item["logprobs"]["tokens"]]
    assert tokens == ["H", "ello", " there"]
    assert [found for item in items for found in item["logprobs"]["top_logprobs"]] == [likely | {token: -0.5} for token in tokens]


def call_of(*cities: str) -> str:
    """As the model writes it."""
    tag = recipe.SpecialToken.Dsml.default_str()
    calls = [
        f'<{tag}invoke name="weather">\n<{tag}parameter name="city" string="true">{city}</{tag}parameter>\n</{tag}invoke>\n'
        for city in cities
    ]
    return f"<{tag}tool_calls>\n{''.join(calls)}</{tag}tool_calls>"


SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS: dict[Dialect, dict[str, Any]] = {
    CHAT: {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}},
    RESPONSES: {"type": "function", "name": "weather", "parameters": SCHEMA},
    MESSAGES: {"name": "weather", "input_schema": SCHEMA},
}
ONE: dict[Dialect, dict[str, Any]] = {
    CHAT: {"parallel_tool_calls": False},
    RESPONSES: {"parallel_tool_calls": False},
    MESSAGES: {"tool_choice": {"type": "auto", "disable_parallel_tool_use": True}},
}
CALLED = {
    CHAT: lambda whole: [call["function"]["arguments"] for call in whole["choices"][0]["message"]["tool_calls"]],
    RESPONSES: lambda whole: [item["arguments"] for item in whole["output"] if item["type"] == "function_call"],
    MESSAGES: lambda whole: [json.dumps(block["input"]) for block in whole["content"] if block["type"] == "tool_use"],
}
ENDED = {
    CHAT: lambda whole: whole["choices"][0]["finish_reason"] == "tool_calls",
    RESPONSES: lambda whole: whole["status"] == "completed",
    MESSAGES: lambda whole: whole["stop_reason"] == "tool_use",
}


@pytest.mark.parametrize("group", [1, 7, 1000])
@pytest.mark.parametrize("dialect", BODIES)
def test_who_wants_one_call_at_most_gets_the_first_and_pays_for_no_more(dialect: Dialect, group: int) -> None:
    model = Model(call_of("Paris", "Rome"), FinishReason.STOP, group)
    both = answer(model, dialect, tools=[TOOLS[dialect]])
    one = answer(model, dialect, tools=[TOOLS[dialect]], **ONE[dialect])
    assert [json.loads(text)["city"] for text in CALLED[dialect](both)] == ["Paris", "Rome"]
    assert [json.loads(text)["city"] for text in CALLED[dialect](one)] == ["Paris"]
    assert ENDED[dialect](one)
    key = "completion_tokens" if dialect is CHAT else "output_tokens"
    assert one["usage"][key] < both["usage"][key]
    plain = answer(Model("Hello there", FinishReason.STOP, group), dialect, tools=[TOOLS[dialect]], **ONE[dialect])
    assert "Hello there" in json.dumps(plain)


def test_a_response_repeats_what_it_was_asked_with() -> None:
    model, asked = Model('He said "response":{ and left', FinishReason.STOP), {"metadata": {"order": "17"}, "parallel_tool_calls": False}
    whole = answer(model, RESPONSES, **asked)
    found = [event["response"] for event in events(model, RESPONSES, **asked) if "response" in event]
    assert len(found) == 3, "created, in progress, completed"
    assert all({key: one[key] for key in asked} == asked for one in (whole, *found))
    assert found[-1]["output"][0]["content"][0]["text"] == whole["output"][0]["content"][0]["text"] == CODEC.decode(model.token_ids[:-1])
    plain = answer(model, RESPONSES)
    assert (plain["metadata"], plain["parallel_tool_calls"]) == ({}, True)
    with pytest.raises(InvalidRequest, match="metadata must be an object"):
        answer(model, RESPONSES, metadata=["x"])


@pytest.mark.parametrize("options", [[], 0, "", False, {"include_usage": 1}])
def test_stream_options_that_are_no_options_are_refused(options: Any) -> None:
    service = new_service(Model(" ", FinishReason.STOP))
    with pytest.raises(InvalidRequest) as refused:
        completions.parse({"model": "demo", "prompt": "a", "stream": True, "stream_options": options}, service)
    assert refused.value.param in ("stream_options", "include_usage")

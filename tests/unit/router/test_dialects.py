"""One answer of a model as the four dialects tell it."""

from __future__ import annotations

import asyncio
import json
import pathlib
from collections.abc import AsyncGenerator
from typing import Any, cast

import pytest
from prometheus_client import CollectorRegistry

from core.clock import SystemClock
from core.request import FinishReason, Request
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
HELLO = [{"role": "user", "content": "Hello"}]
BODIES: dict[Dialect, dict[str, Any]] = {
    CHAT: {"messages": HELLO},
    RESPONSES: {"input": "Hello"},
    MESSAGES: {"messages": HELLO, "max_tokens": 400},
}


class Model:
    """In a relay's place: says the text, a token a time, and ends as it is told."""

    def __init__(self, text: str, ending: FinishReason) -> None:
        self.token_ids = CODEC.encode(text) + (END if ending is FinishReason.STOP else [])
        self.ending = ending

    async def generate(self, request: Request, journey: Journey) -> AsyncGenerator[Output, None]:
        for place, token in enumerate(self.token_ids, 1):
            await asyncio.sleep(0)
            yield Output(token_ids=(token,), finish_reason=self.ending if place == len(self.token_ids) else None)


def new_service(model: Model, max_model_len: int = 4096) -> Service:
    relay = cast(Relay, model)
    return Service(RouterConfig(), "demo", max_model_len, CODEC, relay, RouterMetrics(CollectorRegistry(), "r"), SystemClock())


def new_chat(model: Model, dialect: Dialect, body: dict[str, Any]) -> Chat:
    service = new_service(model)
    form = ChatFormat(service, default_thinking=False)
    return Chat(service, form, dialect, form.parse({"model": "demo", **BODIES[dialect], **body}, dialect))


def answer(model: Model, dialect: Dialect, **body: Any) -> dict[str, Any]:
    return asyncio.run(new_chat(model, dialect, body).response())


def events(model: Model, dialect: Dialect, **body: Any) -> list[dict[str, Any]]:
    async def read() -> list[bytes]:
        return [event async for event in new_chat(model, dialect, {**body, "stream": True}).events()]

    lines = [line for event in asyncio.run(read()) for line in event.splitlines() if line.startswith(b"data: {")]
    return [json.loads(line.removeprefix(b"data: ")) for line in lines]


def completed(model: Model) -> dict[str, Any]:
    async def usage() -> dict[str, Any]:
        service = new_service(model)
        completion = completions.Completion(service, completions.parse({"model": "demo", "prompt": "a", "max_tokens": 64}, service))
        async for _ in completion.choices():
            pass
        return completion.usage()

    return asyncio.run(usage())


@pytest.mark.parametrize("ending", FinishReason)
@pytest.mark.parametrize("text", ["Hello there", "I look it up.</think>Hello there", ""])
def test_usage_counts_every_token_of_the_answer_the_one_that_ends_it_too_in_all_dialects(text: str, ending: FinishReason) -> None:
    model = Model(text or " ", ending)
    count, thinking = len(model.token_ids), {"chat_template_kwargs": {"thinking": "</think>" in text}}
    assert completed(model)["completion_tokens"] == count
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

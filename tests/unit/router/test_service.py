"""The request log: how a sequence ended, as the client was told."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import pathlib
import threading
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Any, cast

import pytest
from prometheus_client import CollectorRegistry

from core.clock import SystemClock
from core.errors import MemberLost
from core.request import FinishReason, Request
from router import completions
from router.chat import Chat, ChatFormat
from router.config import RouterConfig
from router.dialects import CHAT
from router.metrics import RouterMetrics
from router.relay import Journey, Output, Relay
from router.service import Service
from router.tokens import TextCodec

MODEL = pathlib.Path(__file__).resolve().parents[3] / "deploy" / "demo_model" / "checkpoint"
CODEC = TextCodec(MODEL)
SAID = tuple(CODEC.encode("the red fox has the lamp. The owl has the"))


class Said:
    """A relay that says SAID, one token a time, and then `ending`."""

    def __init__(self, ending: FinishReason | BaseException) -> None:
        self.ending = ending

    async def generate(self, request: Request, journey: Journey) -> AsyncGenerator[Output, None]:
        for place, token in enumerate(SAID):
            await asyncio.sleep(0)
            is_last = place == len(SAID) - 1
            if is_last and isinstance(self.ending, BaseException):
                raise self.ending
            reason = self.ending if is_last and isinstance(self.ending, FinishReason) else None
            yield Output(token_ids=(token,), finish_reason=reason)


@pytest.fixture
def lines() -> Iterator[list[str]]:
    logger, found = logging.getLogger("baton.request"), list[str]()
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield found
    logger.removeHandler(handler)
    logger.setLevel(level)


def new_service(ending: FinishReason | BaseException) -> Service:
    metrics = RouterMetrics(CollectorRegistry(), "r")
    return Service(RouterConfig(), "demo", 512, CODEC, cast(Relay, Said(ending)), metrics, SystemClock())


async def complete(service: Service, leave_after: int = 10**6, **body: Any) -> None:
    parsed = completions.parse({"model": "demo", "prompt": "a", "max_tokens": 64, **body}, service)
    async with aclosing(completions.Completion(service, parsed, "a").choices()) as items:
        async for _ in items:
            leave_after -= 1
            if leave_after == 0:
                return


def fields(line: str) -> dict[str, str]:
    return dict(pair.split("=", 1) for pair in line.split() if "=" in pair)


@pytest.mark.parametrize(
    ("ending", "body", "status", "reason"),
    [
        (FinishReason.LENGTH, {}, "ok", "length"),
        (FinishReason.STOP, {}, "ok", "stop"),
        (FinishReason.LENGTH, {"stop": ["lamp"]}, "ok", "stop"),
        (FinishReason.LENGTH, {"stop": ["owl has the"]}, "ok", "stop"),
        (FinishReason.LENGTH, {"stop": ["dragon"]}, "ok", "length"),
        (FinishReason.LENGTH, {"leave_after": 2}, "cancelled", "none"),
        (MemberLost("gone"), {}, "MemberLost", "none"),
        (ZeroDivisionError("a bug"), {}, "InternalError", "none"),
    ],
)
def test_the_log_names_the_finish_reason_that_the_client_was_told(
    lines: list[str], ending: FinishReason | BaseException, body: dict[str, Any], status: str, reason: str
) -> None:
    service = new_service(ending)
    raised = pytest.raises(type(ending)) if isinstance(ending, BaseException) else contextlib.nullcontext()
    with raised:
        asyncio.run(complete(service, **body))
    (line,) = lines
    assert (fields(line)["status"], fields(line)["finish_reason"]) == (status, reason), line
    assert service.num_requests == 0
    (counter,) = service.metrics.sequences.collect()
    assert [(s.labels["outcome"], s.value) for s in counter.samples if s.name == "baton_router_sequences_total"] == [(status, 1.0)]


def test_other_requests_go_on_while_a_long_body_is_parsed() -> None:
    async def both() -> str:
        service, went_on = new_service(FinishReason.LENGTH), threading.Event()
        asyncio.get_running_loop().call_later(0.01, went_on.set)
        try:
            return await service.in_thread(lambda: "whole" if went_on.wait(10) else "the event loop stood still")
        finally:
            service.close()

    assert asyncio.run(both()) == "whole"


def test_a_stop_sequence_of_a_chat_is_logged_as_stop(lines: list[str]) -> None:
    service = new_service(FinishReason.LENGTH)
    form = ChatFormat(service, default_thinking=False)
    body = {"model": "demo", "messages": [{"role": "user", "content": "Hello"}], "stop": ["lamp"]}
    answer = asyncio.run(Chat(service, form, CHAT, form.parse(body, CHAT), "a").response())
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert (fields(lines[0])["status"], fields(lines[0])["finish_reason"]) == ("ok", "stop")


@pytest.mark.parametrize("stop_token_ids", [[], [SAID[-1]]])
def test_the_token_that_ends_a_sequence_is_no_text_in_any_dialect(stop_token_ids: list[int]) -> None:
    service = new_service(FinishReason.STOP)
    form = ChatFormat(service, default_thinking=False)
    body = {"model": "demo", "stop_token_ids": stop_token_ids}
    parsed = form.parse({**body, "messages": [{"role": "user", "content": "Hello"}]}, CHAT)
    chat = asyncio.run(Chat(service, form, CHAT, parsed, "a").response())["choices"][0]["message"]["content"]

    async def completed() -> str:
        parsed = completions.parse({**body, "prompt": "a", "max_tokens": 64}, service)
        return "".join([item["text"] async for item in completions.Completion(service, parsed, "a").choices()])

    assert chat == asyncio.run(completed()) == CODEC.decode(SAID[:-1])


def test_a_client_that_leaves_many_echoed_choices_leaves_nothing_counted() -> None:
    """More of them than are read ahead."""
    service = new_service(FinishReason.LENGTH)
    asyncio.run(complete(service, leave_after=1, prompt=["the red fox"] * 40, n=8, echo=True))
    assert (service.num_requests, service._admission.waiting_tokens) == (0, 0)


def test_an_echoed_prompt_comes_with_the_first_token_so_that_an_early_error_has_a_status(monkeypatch: pytest.MonkeyPatch) -> None:
    async def lost(self: Said, request: Request, journey: Journey) -> AsyncGenerator[Output, None]:
        raise MemberLost("gone")
        yield Output()

    async def first() -> dict[str, Any]:
        service = new_service(FinishReason.LENGTH)
        parsed = completions.parse({"model": "demo", "prompt": "the red fox", "max_tokens": 64, "echo": True}, service)
        async with aclosing(completions.Completion(service, parsed, "a").choices()) as items:
            return await anext(items)

    assert asyncio.run(first())["text"].startswith("the red fox")
    monkeypatch.setattr(Said, "generate", lost)
    with pytest.raises(MemberLost):
        asyncio.run(first())


@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize("stop", [[], ["lamp"]])
def test_usage_of_several_choices_has_one_prompt_and_the_tokens_of_all(stop: list[str], thinking: bool) -> None:
    service = new_service(FinishReason.LENGTH)
    form = ChatFormat(service, default_thinking=thinking)
    body = {"model": "demo", "messages": [{"role": "user", "content": "Hello"}], "stop": stop, "n": 3}

    def whole(count: int) -> dict[str, Any]:
        usage: dict[str, Any] = asyncio.run(Chat(service, form, CHAT, form.parse({**body, "n": count}, CHAT), "a").response())["usage"]
        return usage

    async def streamed() -> list[dict[str, Any]]:
        options = {"stream": True, "stream_options": {"include_usage": True}}
        events = [event async for event in Chat(service, form, CHAT, form.parse({**body, **options}, CHAT), "a").events()]
        assert events[-1] == b"data: [DONE]\n\n"
        return [json.loads(event.removeprefix(b"data: ")) for event in events[:-1]]

    one, three, events = whole(1), whole(3), asyncio.run(streamed())
    assert one["completion_tokens"] > 0 and ("completion_tokens_details" in one) == thinking
    assert three["prompt_tokens"] == one["prompt_tokens"]
    assert three["completion_tokens"] == 3 * one["completion_tokens"]
    assert three["total_tokens"] == three["prompt_tokens"] + three["completion_tokens"]
    if thinking:
        assert three["completion_tokens_details"]["reasoning_tokens"] == 3 * one["completion_tokens_details"]["reasoning_tokens"] > 0
    assert three.keys() == one.keys()
    assert events[-1]["usage"] == three and events[-1]["choices"] == []
    assert len({event["created"] for event in events}) == 1

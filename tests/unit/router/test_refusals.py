"""A chat request that is wrong is refused with the name of the field and what is allowed; one that only looks so is served."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterator
from typing import Any, cast

import pytest
from prometheus_client import CollectorRegistry

from core.clock import SystemClock
from core.errors import InvalidRequest
from router.chat import ChatFormat
from router.config import RouterConfig
from router.dialects import CHAT, MESSAGES, RESPONSES, Dialect
from router.metrics import RouterMetrics
from router.relay import Relay
from router.service import Service
from router.tokens import TextCodec

MODEL = pathlib.Path(__file__).resolve().parents[3] / "deploy" / "demo_model" / "checkpoint"
HELLO = [{"role": "user", "content": "Hello"}]
GOOD: dict[Dialect, dict[str, Any]] = {
    CHAT: {"messages": HELLO},
    RESPONSES: {"input": "Hello"},
    MESSAGES: {"messages": HELLO, "max_tokens": 4},
}


@pytest.fixture(scope="module")
def form() -> Iterator[ChatFormat]:
    metrics = RouterMetrics(CollectorRegistry(), "r")
    service = Service(RouterConfig(), "demo", 512, TextCodec(MODEL), cast(Relay, None), metrics, SystemClock())
    yield ChatFormat(service, default_thinking=False)
    service.close()


@pytest.mark.parametrize(
    ("dialect", "field", "value", "allowed"),
    [
        (CHAT, "messages", "hi", "a list of objects"),
        (CHAT, "messages", [1], "a list of objects"),
        (CHAT, "messages", [{"role": "king", "content": "a"}], "`system`, `user`"),
        (CHAT, "messages", [{"role": "user", "content": 1}], "a string or a list"),
        (CHAT, "temperature", "hot", "a number"),
        (CHAT, "temperature", 2.5, "[0, 2]"),
        (CHAT, "max_completion_tokens", 0, "[1, 2147483648]"),
        (CHAT, "max_completion_tokens", 512, "512"),
        (CHAT, "top_logprobs", -1, "[0, 20]"),
        (CHAT, "stop", 1, "a string or a list"),
        (CHAT, "stop", ["a"] * 17, "at most 16"),
        (CHAT, "stream", "yes", "a boolean"),
        (CHAT, "stream_options", {"include_usage": True}, "stream = true"),
        (CHAT, "tools", [1], "an object"),
        (CHAT, "tool_choice", "required", "has no tools"),
        (CHAT, "functions", [{"name": "f"}], "send tools"),
        (CHAT, "modalities", ["text", "audio"], '["text"]'),
        (CHAT, "response_format", "x", "an object"),
        (RESPONSES, "max_output_tokens", "x", "an integer"),
        (RESPONSES, "instructions", 1, "a string"),
        (RESPONSES, "reasoning", {"effort": "zzz"}, "`low`"),
        (MESSAGES, "messages", "x", "a list of objects"),
        (MESSAGES, "stop_sequences", ["a"] * 17, "at most 16"),
        (MESSAGES, "tool_choice", {"type": "any"}, "has no tools"),
        (MESSAGES, "thinking", "x", "an object"),
        (MESSAGES, "output_config", {"format": {"type": "json_schema", "schema": {}}}, "cannot be enforced"),
        (CHAT, "messages", [{"role": "user", "content": [{"type": "file", "file": {"file_id": "f"}}]}], "files"),
        (RESPONSES, "input", [{"role": "user", "content": [{"type": "input_file", "file_id": "f"}]}], "files"),
        (RESPONSES, "input", [{"type": "item_reference", "id": "msg_1"}], "item itself"),
        (MESSAGES, "messages", [{"role": "user", "content": [{"type": "document", "source": {"type": "text"}}]}], "documents"),
        (RESPONSES, "prompt", {"id": "pmpt_1"}, "not supported"),
    ],
)
def test_a_refusal_names_the_field_and_what_is_allowed(form: ChatFormat, dialect: Dialect, field: str, value: Any, allowed: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        form.parse({"model": "demo", **GOOD[dialect], field: value}, dialect)
    assert refused.value.param == field
    assert field in str(refused.value) or allowed in ("files", "documents", "item itself"), str(refused.value)
    assert allowed in str(refused.value), str(refused.value)


SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS: dict[Dialect, list[dict[str, Any]]] = {
    CHAT: [{"type": "function", "function": {"name": name, "parameters": SCHEMA}} for name in ("weather", "time")],
    RESPONSES: [{"type": "function", "name": name, "parameters": SCHEMA} for name in ("weather", "time")],
    MESSAGES: [{"name": name, "input_schema": SCHEMA} for name in ("weather", "time")],
}


@pytest.mark.parametrize(
    ("dialect", "choice", "tools"),
    [
        (CHAT, {"type": "function", "function": {"name": "news"}}, TOOLS[CHAT]),
        (RESPONSES, {"type": "function", "name": "news"}, TOOLS[RESPONSES]),
        (MESSAGES, {"type": "tool", "name": "news"}, TOOLS[MESSAGES]),
        (RESPONSES, "required", [{"type": "web_search"}]),
        (RESPONSES, {"type": "web_search"}, [*TOOLS[RESPONSES], {"type": "web_search"}]),
    ],
)
def test_a_tool_that_cannot_be_called_is_not_asked_for(form: ChatFormat, dialect: Dialect, choice: Any, tools: list[Any]) -> None:
    with pytest.raises(InvalidRequest) as refused:
        form.parse({"model": "demo", **GOOD[dialect], "tools": tools, "tool_choice": choice}, dialect)
    assert refused.value.param == "tool_choice" and "tool_choice" in str(refused.value)


def test_the_reason_of_a_refusal_is_not_looked_for_in_thousands_of_fields(form: ChatFormat) -> None:
    asked = list[bytes]()

    class Counted:
        def __init__(self, body: bytes) -> None:
            asked.append(body)
            raise ValueError(f"no {len(asked)}")

    dialect = dataclasses.replace(CHAT, request=Counted)
    with pytest.raises(InvalidRequest):
        form.parse({"model": "demo", **GOOD[CHAT], "tools": TOOLS[CHAT], **{f"made_up_{number}": 1 for number in range(5000)}}, dialect)
    assert 2 < len(asked) < 200


def test_any_tool_is_asked_for_in_the_same_words_in_all_dialects(form: ChatFormat) -> None:
    wanted = {CHAT: "required", RESPONSES: "required", MESSAGES: {"type": "any"}}
    found = [
        form.parse({"model": "demo", **GOOD[dialect], "tools": TOOLS[dialect], "tool_choice": choice}, dialect)
        for dialect, choice in wanted.items()
    ]
    assert len({request.prompt for request in found}) == 1
    assert all(request.parsing.starts_in_tool_calls for request in found)


@pytest.mark.parametrize("dialect", [CHAT, RESPONSES, MESSAGES])
def test_who_must_call_a_tool_does_not_think_before_unless_told_to(form: ChatFormat, dialect: Dialect) -> None:
    thoughtful = ChatFormat(form._service, default_thinking=True)
    choice = {"type": "any"} if dialect is MESSAGES else "required"
    body = {"model": "demo", **GOOD[dialect], "tools": TOOLS[dialect], "tool_choice": choice}
    assert thoughtful.parse(body, dialect).prompt == form.parse(body, dialect).prompt
    with pytest.raises(InvalidRequest) as refused:
        form.parse({**body, "chat_template_kwargs": {"thinking": True}}, dialect)
    assert refused.value.param == "tool_choice" and "hinking mode" in str(refused.value)


def test_a_field_that_is_right_in_company_is_not_blamed_for_another(form: ChatFormat) -> None:
    body = {"model": "demo", "stream_options": {"include_usage": True}, "stream": True, "messages": [{"role": "king", "content": "a"}]}
    with pytest.raises(InvalidRequest) as refused:
        form.parse(body, CHAT)
    assert refused.value.param == "messages"


@pytest.mark.parametrize("extra", [{"seed": -1}, {"tool_choice": "auto"}, {"modalities": ["text"]}, {"unheard_of": 1}, {"functions": []}])
def test_what_openai_takes_is_taken(form: ChatFormat, extra: dict[str, Any]) -> None:
    assert form.parse({"model": "demo", "messages": HELLO, **extra}, CHAT).prompt


def test_a_developer_speaks_as_the_system(form: ChatFormat) -> None:
    prompts = [
        form.parse({"model": "demo", "messages": [{"role": role, "content": "Be brief."}, *HELLO]}, CHAT).prompt
        for role in ("system", "developer")
    ]
    assert prompts[0] == prompts[1]

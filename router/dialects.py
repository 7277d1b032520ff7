"""The three chat dialects, as deepseek-recipe knows them, and what streams of all dialects are made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import deepseek_recipe as recipe


@dataclass(frozen=True, slots=True)
class Dialect:
    request: Any
    """The library's class of a request."""
    response: Any
    """And of a whole answer, which also knows the events of a stream."""
    id_prefix: str
    prompt_key: str
    """The field of the prompt, for refusals."""
    max_tokens_keys: tuple[str, ...]
    """Fields that bound the answer; the first that is set counts."""


CHAT = Dialect(
    recipe.ChatCompletionRequest, recipe.ChatCompletionResponse, "chatcmpl-", "messages", ("max_completion_tokens", "max_tokens")
)
RESPONSES = Dialect(recipe.ResponsesRequest, recipe.ResponsesResponse, "resp_", "input", ("max_output_tokens",))
MESSAGES = Dialect(recipe.MessagesRequest, recipe.MessagesResponse, "msg_", "messages", ("max_tokens",))


def sse(data: bytes, event: str | None = None) -> bytes:
    """One server-sent event."""
    return (b"event: " + event.encode() + b"\n" if event else b"") + b"data: " + data + b"\n\n"

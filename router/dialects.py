"""The three chat dialects, as deepseek-recipe knows them, and what streams of all dialects are made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import deepseek_recipe as recipe


@dataclass(frozen=True, slots=True)
class Dialect:
    request: Any
    response: Any
    id_prefix: str
    prompt_key: str
    max_tokens_keys: tuple[str, ...]


CHAT = Dialect(
    recipe.ChatCompletionRequest, recipe.ChatCompletionResponse, "chatcmpl-", "messages", ("max_completion_tokens", "max_tokens")
)
RESPONSES = Dialect(recipe.ResponsesRequest, recipe.ResponsesResponse, "resp_", "input", ("max_output_tokens",))
MESSAGES = Dialect(recipe.MessagesRequest, recipe.MessagesResponse, "msg_", "messages", ("max_tokens",))


def sse(data: bytes, event: str | None = None) -> bytes:
    """One server-sent event."""
    return (b"event: " + event.encode() + b"\n" if event else b"") + b"data: " + data + b"\n\n"

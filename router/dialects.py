"""The three chat dialects, as deepseek-recipe knows them."""

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

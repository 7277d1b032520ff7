"""What a chat request is refused for, in words that name the field and what is allowed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import deepseek_recipe as recipe
import orjson

from core.errors import InvalidRequest
from router.dialects import CHAT, MESSAGES, RESPONSES, Dialect
from router.sampling import MAX_STOPS, number

REFUSED = (recipe.ConversionError, ValueError, TypeError, RuntimeError, orjson.JSONEncodeError)
"""What the library raises for a request that it does not take."""


def refuse_unservable(body: Mapping[str, Any], dialect: Dialect) -> None:
    """Raises InvalidRequest for what the library would pass over or paint over (a picture becomes the words "[Unsupported Image]"), or
    refuse in words that name no field or limit."""
    key = dialect.prompt_key
    messages = body.get(key)
    if dialect is not RESPONSES and not (isinstance(messages, list) and all(isinstance(message, dict) for message in messages)):
        raise InvalidRequest(f"{key} must be a list of objects with role and content", param=key)
    if isinstance(messages, list) and _holds_image(messages):
        raise InvalidRequest("images are not supported by this model", param=key)
    number(body, "top_logprobs", 0, 20, None, integer=True)
    for key in ("stop", "stop_sequences"):
        if isinstance(body.get(key), list) and len(body[key]) > MAX_STOPS:
            raise InvalidRequest(f"{key} has {len(body[key])} items; at most {MAX_STOPS} are allowed", param=key)
    choice = body.get("tool_choice")
    wanted = choice.get("type") if isinstance(choice, dict) else choice
    if wanted in ("required", "any", "function", "tool") and not body.get("tools"):
        raise InvalidRequest("tool_choice asks for a tool, and the request has no tools", param="tool_choice")
    if dialect is CHAT and body.get("functions"):
        raise InvalidRequest("functions is not supported: send tools, which came in its place", param="functions")
    if dialect is CHAT and body.get("modalities") not in (None, ["text"]):
        raise InvalidRequest('modalities: this model answers in text; allowed: ["text"]', param="modalities")
    if dialect is RESPONSES:
        for key in ("previous_response_id", "conversation", "background"):
            if body.get(key):
                raise InvalidRequest(f"{key} is not supported: this server keeps no responses; send the whole conversation", param=key)


def _holds_image(messages: list[Any]) -> bool:
    """Whether a content part of any message, also inside a tool's result, is a picture."""
    left = list(messages)
    while left:
        part = left.pop()
        if not isinstance(part, dict):
            continue
        if part.get("type") in ("image_url", "input_image", "image"):
            return True
        for key in ("content", "output"):
            if isinstance(inside := part.get(key), list):
                left += inside
    return False


def refuse_unenforceable(converted: recipe.ConversationRequest) -> None:
    """Raises InvalidRequest for an output format that nothing here holds the model to."""
    wanted = converted.conversation.response_format
    if wanted in ("json_schema", "regex"):
        raise InvalidRequest(
            f"response_format {wanted} cannot be enforced by this server; allowed: text, json_object", param="response_format"
        )


def refusal(error: Exception, body: Mapping[str, Any], dialect: Dialect, options: recipe.ConversionOptions) -> InvalidRequest:
    """The library's refusal of `body`, with the field that it is about: the one that it refuses with the same words in a request that is
    good otherwise."""
    said = _words_of(error)
    smallest = {"model": body["model"], dialect.prompt_key: [{"role": "user", "content": "a"}]}
    if dialect is MESSAGES:
        smallest["max_tokens"] = 1
    words = said.removeprefix("invalid request body: ")
    words = re.sub(r"(internally tagged enum|struct) \w+", "an object", words).replace("expected f32", "expected a number")
    for field, value in body.items():
        try:
            dialect.request(orjson.dumps({**smallest, field: value})).convert(options)
        except REFUSED as refused:
            if _words_of(refused) == said:
                return InvalidRequest(words if field in words else f"{field}: {words}", param=field)
    return InvalidRequest(words)


def _words_of(error: Exception) -> str:
    """What the library said; a ConversionError's sentence is inside an error body of any dialect."""
    if not isinstance(error, recipe.ConversionError):
        return str(error)
    try:
        return str(orjson.loads(error.body)["error"]["message"])
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return str(error.body)

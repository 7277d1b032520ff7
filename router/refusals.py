"""What a chat request is refused for, in words that name the field and what is allowed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import islice
from typing import Any

import deepseek_recipe as recipe
import orjson

from core.errors import InvalidRequest
from router.dialects import CHAT, MESSAGES, RESPONSES, Dialect
from router.sampling import MAX_STOPS, boolean, number

_IMAGES = "images are not supported by this model"
_FILES = "files are not supported: send their text"
UNREADABLE = {
    "image_url": _IMAGES,
    "input_image": _IMAGES,
    "image": _IMAGES,
    "file": _FILES,
    "input_file": _FILES,
    "document": "documents are not supported: send their text",
    "item_reference": "item_reference is not supported: this server keeps no items; send the item itself",
}
"""Parts of a conversation, by type, that are not there for the model to read."""

FORCED = ("required", "any", "function", "tool", "custom", "web_search", "web_search_2025_08_26")
"""What tool_choice is, or its type, where the answer must be a call."""

MAX_SUSPECTS = 64
"""Fields of a request that is refused that are looked at for the reason: no honest one has more."""

REFUSED = (recipe.ConversionError, ValueError, TypeError, RuntimeError, orjson.JSONEncodeError)
"""What the library raises for a request that it does not take."""


def refuse_unservable(body: Mapping[str, Any], dialect: Dialect) -> None:
    """Raises InvalidRequest for what the library would pass over or paint over (a picture becomes the words "[Unsupported Image]"), or
    refuse in words that name no field or limit."""
    key = dialect.prompt_key
    messages = body.get(key)
    if dialect is not RESPONSES and not (isinstance(messages, list) and all(isinstance(message, dict) for message in messages)):
        raise InvalidRequest(f"{key} must be a list of objects with role and content", param=key)
    if isinstance(messages, list) and (found := _unreadable(messages)):
        raise InvalidRequest(found, param=key)
    number(body, "top_logprobs", 0, 20, None, integer=True)
    for key in ("stop", "stop_sequences"):
        if isinstance(body.get(key), list) and len(body[key]) > MAX_STOPS:
            raise InvalidRequest(f"{key} has {len(body[key])} items; at most {MAX_STOPS} are allowed", param=key)
    if must_call(body) and not body.get("tools"):
        raise InvalidRequest("tool_choice asks for a tool, and the request has no tools", param="tool_choice")
    if dialect is CHAT and body.get("functions"):
        raise InvalidRequest("functions is not supported: send tools, which came in its place", param="functions")
    if dialect is CHAT and body.get("modalities") not in (None, ["text"]):
        raise InvalidRequest('modalities: this model answers in text; allowed: ["text"]', param="modalities")
    if dialect is RESPONSES:
        for key in ("previous_response_id", "conversation", "background", "prompt"):
            if body.get(key):
                raise InvalidRequest(f"{key} is not supported: this server keeps none; send the whole conversation", param=key)
    if dialect is MESSAGES:
        config = body.get("output_config")
        if body.get("output_format") or (isinstance(config, dict) and config.get("format")):
            raise InvalidRequest("output_format and output_config.format cannot be enforced by this server", param="output_config")


def must_call(body: Mapping[str, Any]) -> bool:
    """Whether the answer is to be a call of a tool, whatever the model would rather say."""
    choice = body.get("tool_choice")
    return (choice.get("type") if isinstance(choice, dict) else choice) in FORCED


def wants_single_call(body: Mapping[str, Any], dialect: Dialect) -> bool:
    """Whether no more than one tool may be called in an answer. Raises InvalidRequest."""
    if dialect is not MESSAGES:
        return not boolean(body, "parallel_tool_calls", True)
    choice = body.get("tool_choice")
    return isinstance(choice, dict) and boolean(choice, "disable_parallel_tool_use", False)


def _unreadable(messages: list[Any]) -> str:
    """Why the model cannot read a message, or a part of one, also inside a tool's result; "" if it can read all."""
    left = list(messages)
    while left:
        part = left.pop()
        if not isinstance(part, dict):
            continue
        kind = part.get("type")
        if isinstance(kind, str) and kind in UNREADABLE:
            return UNREADABLE[kind]
        for key in ("content", "output"):
            if isinstance(inside := part.get(key), list):
                left += inside
    return ""


def refuse_unenforceable(conversation: recipe.Conversation, body: Mapping[str, Any], dialect: Dialect) -> None:
    """Raises InvalidRequest for an output format that nothing here holds the model to, and for a call that it cannot make."""
    wanted = conversation.response_format
    if wanted in ("json_schema", "regex"):
        field = "text.format" if dialect is RESPONSES else "response_format"
        raise InvalidRequest(f"{field} {wanted} cannot be enforced by this server; allowed: text, json_object", param=field)
    if must_call(body) and conversation.tool_choice != "required":
        raise InvalidRequest("tool_choice asks for a tool that this server does not have; allowed: functions of tools", param="tool_choice")


def refusal(error: Exception, body: Mapping[str, Any], dialect: Dialect, options: recipe.ConversionOptions) -> InvalidRequest:
    """The library's refusal of `body`, with the field that it is about: the one that it refuses with the same words in a request that is
    good otherwise."""
    said = _words_of(error)
    smallest = {"model": body["model"], dialect.prompt_key: [{"role": "user", "content": "a"}]}
    if dialect is MESSAGES:
        smallest["max_tokens"] = 1
    words = said.removeprefix("invalid request body: ")
    words = re.sub(r"(internally tagged enum|struct) \w+", "an object", words).replace("expected f32", "expected a number")
    company = {"tools": body["tools"]} if body.get("tools") else {}  # that of tool_choice
    for good in (smallest, smallest | company):
        for field, value in islice(body.items(), MAX_SUSPECTS):
            try:
                dialect.request(orjson.dumps({**good, field: value})).convert(options)
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

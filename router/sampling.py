"""Sampling fields of a request body, typed and range-checked: the same for all dialects."""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping
from typing import Any

from core.errors import InvalidRequest
from core.request import MAX_LOGIT_BIAS, SamplingParams

MAX_LOGPROBS = 20
MAX_STOPS = 16
MAX_STOP_CHARS = 256


def number(
    body: Mapping[str, Any], key: str, low: float, high: float, default: float | None, *, integer: bool = False, above: bool = False
) -> Any:
    """body[key] as float or int, or the default if absent or null. `above`: low itself is not allowed. Raises InvalidRequest."""
    value = body.get(key)
    if value is None:
        return default
    kind = "an integer" if integer else "a number"
    if isinstance(value, bool) or not isinstance(value, int if integer else (int, float)) or not math.isfinite(value):
        raise InvalidRequest(f"{key} must be {kind}, found {_show(value)}", param=key)
    if not (low < value if above else low <= value) or value > high:
        allowed = f"{'(' if above else '['}{_bound(low)}, {_bound(high)}]"
        raise InvalidRequest(f"{key} is {_show(value)}; it must be {kind} in {allowed}", param=key)
    return value if integer else float(value)


def boolean(body: Mapping[str, Any], key: str, default: bool) -> bool:
    """body[key], or the default if absent or null. Raises InvalidRequest."""
    value = body.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise InvalidRequest(f"{key} must be true or false, found {_show(value)}", param=key)
    return value


def text_list(body: Mapping[str, Any], key: str) -> tuple[str, ...]:
    """body[key]: a string or a list of strings; () if absent or null. Raises InvalidRequest, also for empty ones."""
    value = body.get(key)
    if value is None:
        return ()
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(item, str) and 0 < len(item) <= MAX_STOP_CHARS for item in values):
        raise InvalidRequest(f"{key} must be a string or a list of strings of 1 to {MAX_STOP_CHARS} characters", param=key)
    if len(values) > MAX_STOPS:
        raise InvalidRequest(f"{key} has {len(values)} items; at most {MAX_STOPS} are allowed", param=key)
    return tuple(values)


def logit_bias(body: Mapping[str, Any], vocab_size: int) -> tuple[tuple[int, float], ...]:
    """(token id, bias) of body["logit_bias"], whose keys are texts. Raises InvalidRequest."""
    value = body.get("logit_bias")
    if value is None:
        return ()
    if not isinstance(value, dict) or len(value) > MAX_LOGIT_BIAS:
        raise InvalidRequest(f"logit_bias must be an object of at most {MAX_LOGIT_BIAS} token ids", param="logit_bias")
    pairs = []
    for key, bias in value.items():
        if not (key.isascii() and key.isdigit() and len(key) < 10 and int(key) < vocab_size):
            raise InvalidRequest(f"logit_bias: {key!r} is not a token id in [0, {vocab_size})", param="logit_bias")
        if isinstance(bias, bool) or not isinstance(bias, (int, float)) or not -100 <= bias <= 100:
            raise InvalidRequest(f"logit_bias: {_show(bias)} is not a number in [-100, 100]", param="logit_bias")
        pairs.append((int(key), float(bias)))
    return tuple(pairs)


def token_ids(body: Mapping[str, Any], key: str, vocab_size: int) -> tuple[int, ...]:
    """body[key]: a list of ids; () if absent or null. Raises InvalidRequest."""
    value = body.get(key)
    if value is None:
        return ()
    if not isinstance(value, list) or not all(type(item) is int and 0 <= item < vocab_size for item in value) or len(value) > 64:
        raise InvalidRequest(f"{key} must be a list of at most 64 token ids in [0, {vocab_size})", param=key)
    return tuple(value)


def sampling_params(
    body: Mapping[str, Any], *, max_tokens: int, num_logprobs: int | None, num_prompt_logprobs: int | None, vocab_size: int
) -> SamplingParams:
    """Raises InvalidRequest naming field and range. Without a seed one is drawn."""
    seed = number(body, "seed", -(2**63), 2**64 - 1, None, integer=True)
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=number(body, "temperature", 0.0, 2.0, 1.0),
        top_p=number(body, "top_p", 0.0, 1.0, 1.0, above=True),
        top_k=max(number(body, "top_k", -1, vocab_size, 0, integer=True), 0),
        min_p=number(body, "min_p", 0.0, 1.0, 0.0),
        presence_penalty=number(body, "presence_penalty", -2.0, 2.0, 0.0),
        frequency_penalty=number(body, "frequency_penalty", -2.0, 2.0, 0.0),
        repetition_penalty=number(body, "repetition_penalty", 0.0, 10.0, 1.0, above=True),
        logit_bias=logit_bias(body, vocab_size),
        seed=secrets.randbits(63) if seed is None else seed % 2**64,
        ignore_eos=boolean(body, "ignore_eos", False),
        stop_token_ids=token_ids(body, "stop_token_ids", vocab_size),
        num_logprobs=num_logprobs,
        num_prompt_logprobs=num_prompt_logprobs,
    )


def _bound(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"


def _show(value: Any) -> str:
    """A short form of a client's value for an error message."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."

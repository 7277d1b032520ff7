"""Errors in each dialect's own shape."""

from __future__ import annotations

import math
from typing import Any

import orjson
from starlette.responses import Response

from core.errors import BatonError, InvalidRequest, Overloaded

_OPENAI_TYPES = {400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error", 413: "invalid_request_error"}
_OPENAI_TYPES |= {405: "invalid_request_error", 429: "rate_limit_error", 503: "service_unavailable", 504: "timeout_error"}
_ANTHROPIC_TYPES = {400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error", 413: "request_too_large"}
_ANTHROPIC_TYPES |= {405: "invalid_request_error", 429: "rate_limit_error", 503: "overloaded_error", 504: "timeout_error"}
_OPENAI_CODES = {"ModelNotFound": "model_not_found", "PromptTooLong": "context_length_exceeded", "Unauthorized": "invalid_api_key"}
_OPENAI_CODES |= {"Overloaded": "rate_limit_exceeded"}
"""Words that OpenAI's clients look for; elsewhere our own."""


def body_of(error: BatonError, *, anthropic: bool) -> dict[str, Any]:
    """The error as a JSON object of the dialect."""
    status = error.http_status
    if anthropic:
        return {"type": "error", "error": {"type": _ANTHROPIC_TYPES.get(status, "api_error"), "message": str(error)}}
    param = error.param if isinstance(error, InvalidRequest) else None
    kind = _OPENAI_TYPES.get(status, "server_error")
    return {"error": {"message": str(error), "type": kind, "param": param, "code": _OPENAI_CODES.get(error.code, error.code)}}


def response_of(error: BatonError, *, anthropic: bool) -> Response:
    headers = {}
    if isinstance(error, Overloaded):
        headers["retry-after"] = str(math.ceil(error.retry_after_s))
    if error.http_status == 401:
        headers["www-authenticate"] = "Bearer"
    content = orjson.dumps(body_of(error, anthropic=anthropic))
    return Response(content, error.http_status, headers, media_type="application/json")

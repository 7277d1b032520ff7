"""The HTTP surface. Each route: read the body, parse it into a request of its dialect, run it, answer or stream."""

from __future__ import annotations

import asyncio
import hmac
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

import orjson
from fastapi import FastAPI, Request
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from core.errors import BatonError, Cancelled, InternalError, InvalidRequest, ModelNotFound, Overloaded, TooLarge, Unauthorized
from core.log import get_logger
from router import completions
from router.chat import Chat, ChatFormat
from router.completions import Completion
from router.dialects import CHAT, MESSAGES, RESPONSES, Dialect, sse
from router.errors import body_of, response_of
from router.members import Members
from router.service import Service

log = get_logger("http")

T = TypeVar("T")

LONG_BODY_BYTES = 8_192
"""A larger one is parsed in a thread: tokenising takes 0.4 us a byte (demo tokenizer, one CPU core), and other streams go on meanwhile."""

HELLO = [{"role": "user", "content": "Hello"}]


class ApiKeys:
    """ASGI middleware: /v1 only with one of the keys, compared in constant time against all of them. `refused` is told of each other."""

    def __init__(self, app: ASGIApp, keys: tuple[str, ...], refused: Callable[[], None]) -> None:
        self._app, self._keys, self._refused = app, [key.encode() for key in keys], refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith("/v1") and self._keys and not self._is_known(scope):
            self._refused()
            error = Unauthorized("no valid API key: send it as 'Authorization: Bearer KEY' or 'x-api-key: KEY'")
            await refusal(scope, error)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _is_known(self, scope: Scope) -> bool:
        headers = dict(scope["headers"])
        scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
        offered = (headers.get(b"x-api-key", b""), token.strip() if scheme.lower() == b"bearer" else b"")
        matches = [hmac.compare_digest(one, key) for one in offered for key in self._keys]
        return any(matches)


class RequestIds:
    """ASGI middleware: every reply says what its request is called, in the headers where clients of OpenAI's and Anthropic's APIs look for
    it. The ids of answers end in the same name, and the log has it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        name = uuid.uuid4().hex
        scope.setdefault("state", {})["name"] = name

        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = headers["request-id"] = name
            await send(message)

        await self._app(scope, receive, send_named)


def _is_anthropic(path: str) -> bool:
    return path.startswith("/v1/messages")


def refusal(scope: Scope, error: BatonError) -> Response:
    """The error as the reply of a route. The log has it under the request's name, unless there may be thousands of them a second."""
    path = scope["path"]
    if not isinstance(error, Overloaded):
        log.info("http.refused", id=scope["state"]["name"], path=path[:200], status=error.http_status, error=f"{error.code}: {error}")
    return response_of(error, anthropic=_is_anthropic(path))


def create_app(service: Service, form: ChatFormat, members: Members, registry: CollectorRegistry, api_keys: tuple[str, ...]) -> FastAPI:
    """The ASGI application of one router process."""
    created = int(time.time())
    app = FastAPI(title="baton", version="0.1", docs_url="/docs", redoc_url=None)
    app.add_middleware(ApiKeys, keys=api_keys, refused=lambda: service.metrics.requests.labels("/v1", "401").inc())
    app.add_middleware(RequestIds)

    @app.exception_handler(BatonError)
    async def failed(request: Request, error: BatonError) -> Response:
        _count(request, error.http_status)
        return refusal(request.scope, error)

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> Response:
        """404 and 405 of the routing itself."""
        _count(request, error.status_code)
        path, allowed = request.url.path, (error.headers or {}).get("Allow")
        remedy = f"allowed: {allowed}" if allowed else "the API is under /v1, and described at /docs"
        shown = NoRoute(f"no route {request.method} {path[:200]}; {remedy}", error.status_code)
        response = refusal(request.scope, shown)
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> Response:
        log.exception("http.broken", id=request.state.name, path=request.url.path)
        _count(request, 500)
        return response_of(InternalError(f"internal error: {type(error).__name__}"), anthropic=_is_anthropic(request.url.path))

    def _count(request: Request, status: int) -> None:
        route = request.scope.get("route")
        service.metrics.requests.labels(getattr(route, "path", "unknown"), str(status)).inc()

    async def read_body(request: Request) -> tuple[dict[str, Any], int]:
        """The JSON object of a request, and its size in bytes. Raises TooLarge or InvalidRequest, and Cancelled if it does not come."""
        limit, timeout_s = service.config.max_body_bytes, service.config.request_timeout_s
        parts, size = [], 0
        try:
            async with asyncio.timeout(timeout_s):
                async for part in request.stream():
                    size += len(part)
                    if size > limit:
                        raise TooLarge(f"the body is larger than {limit} bytes")
                    parts.append(part)
        except TimeoutError as error:
            raise Cancelled(f"the request was not whole within {timeout_s:g} s") from error
        except ClientDisconnect as error:
            raise Cancelled("the client left before its request was whole") from error
        try:
            body = orjson.loads(b"".join(parts))
        except orjson.JSONDecodeError as error:
            raise InvalidRequest(f"the body is not JSON: {error}") from error
        if not isinstance(body, dict):
            raise InvalidRequest(f"the body must be a JSON object, found {type(body).__name__}")
        return body, size

    async def parsed_by(request: Request, size: int, parse: Callable[[], T]) -> T:
        """What `parse` makes of a body of `size` bytes."""
        return parse() if size <= LONG_BODY_BYTES else await until_gone(request, service.in_thread(parse))

    async def stream(request: Request, events: AsyncGenerator[bytes, None]) -> Response:
        """Waits for the first event: until then an error has its HTTP status, and later it can only be an event."""
        anthropic = _is_anthropic(request.url.path)
        first = await until_gone(request, _first(events))

        async def whole() -> AsyncIterator[bytes]:
            try:
                async with aclosing(events):
                    yield first
                    async for event in events:
                        yield event
            except Exception as error:  # outermost: this stream ends, the process goes on
                if not isinstance(error, BatonError):
                    log.exception("http.stream_broken", id=request.state.name, path=request.url.path)
                    error = InternalError(f"internal error: {type(error).__name__}")
                yield sse(orjson.dumps(body_of(error, anthropic=anthropic)), "error" if anthropic else None)

        _count(request, 200)
        return StreamingResponse(whole(), media_type="text/event-stream", headers={"cache-control": "no-cache"})

    async def answered(request: Request, work: Chat | Completion, is_stream: bool) -> Response:
        if is_stream:
            return await stream(request, work.events())
        answer = await until_gone(request, work.response())
        _count(request, 200)
        return Response(orjson.dumps(answer), media_type="application/json")

    async def chat_route(request: Request, dialect: Dialect) -> Response:
        body, size = await read_body(request)
        service.refuse_if_full()
        parsed = await parsed_by(request, size, lambda: form.parse(body, dialect))
        return await answered(request, Chat(service, form, dialect, parsed, request.state.name), parsed.stream)

    def documented(**example: Any) -> dict[str, Any]:
        content = {"schema": {"type": "object"}, "example": {"model": service.model, **example}}
        return {"requestBody": {"content": {"application/json": content}, "required": True}}

    @app.post("/v1/chat/completions", openapi_extra=documented(messages=HELLO, max_tokens=32))
    async def chat_completions(request: Request) -> Response:
        """OpenAI Chat Completions."""
        return await chat_route(request, CHAT)

    @app.post("/v1/responses", openapi_extra=documented(input="Hello", max_output_tokens=32))
    async def responses(request: Request) -> Response:
        """OpenAI Responses (stateless: `previous_response_id` is refused)."""
        return await chat_route(request, RESPONSES)

    @app.post("/v1/messages", openapi_extra=documented(messages=HELLO, max_tokens=32))
    async def messages(request: Request) -> Response:
        """Anthropic Messages."""
        return await chat_route(request, MESSAGES)

    @app.post("/v1/messages/count_tokens", openapi_extra=documented(messages=HELLO))
    async def count_tokens(request: Request) -> Response:
        """Tokens of an Anthropic request's prompt."""
        body, size = await read_body(request)
        parsed = await parsed_by(request, size, lambda: form.parse({**body, "max_tokens": 1}, MESSAGES))
        return JSONResponse({"input_tokens": len(parsed.prompt)})

    @app.post("/v1/completions", openapi_extra=documented(prompt="Hello", max_tokens=32))
    async def text_completions(request: Request) -> Response:
        """OpenAI Completions: text or token ids."""
        body, size = await read_body(request)
        service.refuse_if_full()
        if body.get("model") not in (service.model, None):
            raise ModelNotFound(f"the model {str(body['model'])[:100]!r} does not exist; this server has {service.model!r}", param="model")
        service.metrics.ignore(body.keys() - completions.KNOWN)
        parsed = await parsed_by(request, size, lambda: completions.parse(body, service))
        return await answered(request, Completion(service, parsed, request.state.name), parsed.stream)

    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [_model(service, created)]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        if name != service.model:
            raise ModelNotFound(f"the model {name[:100]!r} does not exist; this server has {service.model!r}", param="model")
        return JSONResponse(_model(service, created))

    @app.get("/health")
    async def health() -> Response:
        """200 while this process is alive."""
        return JSONResponse({"status": "ok"})

    @app.get("/ready")
    async def ready() -> Response:
        """200 when a prefill and a decode rank are ready, else 503 with what is missing."""
        missing = [role for role in ("prefill", "decode") if not members.ready(role)]
        counts = {role: len(members.ready(role)) for role in ("prefill", "decode")}
        return JSONResponse({"ready": not missing, "ranks": counts}, 503 if missing else 200)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    return app


class NoRoute(BatonError):
    """Nothing is served under this path, or not with this method."""

    def __init__(self, message: str, http_status: int) -> None:
        super().__init__(message)
        self.http_status = http_status  # type: ignore[misc]


def _model(service: Service, created: int) -> dict[str, Any]:
    return {
        "id": service.model,
        "object": "model",
        "created": created,
        "owned_by": "baton",
        "max_model_len": service.max_model_len or None,
    }


async def _first(events: AsyncGenerator[T, None]) -> T:
    return await anext(events)


async def until_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Await `work`, but cancel it when the client disconnects meanwhile. Raises Cancelled then."""
    task = asyncio.ensure_future(work)

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    watcher = asyncio.create_task(gone())
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Cancelled("the client left")
        return task.result()
    finally:
        watcher.cancel()
        if not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

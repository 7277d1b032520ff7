"""gRPC servers and channels with the settings that every border of baton shares.

Keepalives find a dead peer when nothing else is sent; sessions add their own pings (`PING_INTERVAL_S`), so that a stopped
process is noticed too. Messages carry whole prompts, hence the size limit.
"""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio

from core.errors import ConfigError

PING_INTERVAL_S = 0.5
"""How often each side of a session pings the other when it has nothing else to send."""

MAX_MESSAGE_BYTES = 64 * 2**20
"""A prompt of 1,048,576 token ids takes 4 MB."""

NO_PROXY = ("grpc.enable_http_proxy", 0)
"""Peers are reached directly, whatever `http_proxy` in the environment says: a proxy knows no rank's address, least of all 127.0.0.1."""


def check_liveness(section: str, timeout_s: float) -> None:
    """Raises ConfigError for a `liveness_timeout_s` of a section of the cluster file that would find every peer silent."""
    if not timeout_s > PING_INTERVAL_S:
        raise ConfigError(f"{section}.liveness_timeout_s is {timeout_s}; it must be above {PING_INTERVAL_S:g}, the time between pings")


_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 2_000),
    ("grpc.keepalive_timeout_ms", 4_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 500),
    ("grpc.http2.max_ping_strikes", 0),
    NO_PROXY,
)


class TokenCheck(grpc.aio.ServerInterceptor):  # type: ignore[misc]  # grpc has no types
    """Refuses every call that does not carry the token, before its method is looked up; compared in constant time."""

    def __init__(self, token: str) -> None:
        assert token, "an empty token would let everyone in"
        self._wanted = _bearer(token).encode()

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: Any) -> Any:
        offered = [value for key, value in handler_call_details.invocation_metadata or () if key == "authorization"]
        matches = [hmac.compare_digest(value.encode() if isinstance(value, str) else value, self._wanted) for value in offered]
        if any(matches):
            return await continuation(handler_call_details)
        return grpc.unary_unary_rpc_method_handler(_refuse)


async def _refuse(request: Any, context: Any) -> None:
    await context.abort(grpc.StatusCode.UNAUTHENTICATED, "the call carries no token, or not the right one")


def token_metadata(token: str) -> tuple[tuple[str, str], ...]:
    """What a call must carry to pass TokenCheck."""
    return (("authorization", _bearer(token)),)


def _bearer(token: str) -> str:
    return f"Bearer {token}"


def new_server(token: str = "") -> grpc.aio.Server:
    """An asyncio server; the port is not shared with other processes, so a taken one is an error. With a token every call must
    carry it."""
    interceptors = (TokenCheck(token),) if token else ()
    return grpc.aio.server(interceptors=interceptors, options=(*_OPTIONS, ("grpc.so_reuseport", 0)))


def address_of(host: str, port: int) -> str:
    """host:port as gRPC and URLs want it: an IPv6 address goes in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class Listener:
    """A server whose port is taken from the beginning, so that a taken one is known before a model is loaded."""

    def __init__(self, host: str, port: int) -> None:
        """Port 0: any free one. Raises ConfigError if the address cannot be had."""
        self.server, address = new_server(), address_of(host, port)
        try:
            self.port: int = self.server.add_insecure_port(address)
        except RuntimeError as error:
            raise ConfigError(f"cannot listen on {address}: the port is taken, or the address is not of this machine") from error
        self._is_started = False

    async def start(self) -> None:
        """Answer from now on; services have been added to `server`."""
        await self.server.start()
        self._is_started = True

    async def stop(self, grace_s: float) -> None:
        """End all calls, which have `grace_s` to finish, and free the port."""
        if not self._is_started:  # gRPC frees the port of a server only if it was started
            await self.start()
        await self.server.stop(grace_s)


def new_channel(address: str) -> grpc.aio.Channel:
    """A plaintext channel of its own (not pooled with others to the same address)."""
    reconnect = (("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 1_000))
    return grpc.aio.insecure_channel(address, options=(*_OPTIONS, *reconnect, ("grpc.use_local_subchannel_pool", 1)))

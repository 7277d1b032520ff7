"""What a prefill rank and a decode rank have in common: a life (`RankWorker`), and sessions with routers (`RouterSessions`). What is each
role's own is in `worker.py` and `server.py` of its folder.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import grpc
import grpc.aio
from prometheus_client import CollectorRegistry

from core.clock import new_incarnation
from core.codec import encode_load, encode_member
from core.errors import Unavailable
from core.kv_layout import WIRE_VERSION, KVLayout
from core.log import get_logger
from core.metrics import MetricsEndpoint, new_registry
from core.request import Load, Member
from core.rpc import Listener
from core.session import Outbox, first_message, serve_session
from protos import common_pb2

log = get_logger("rank")

STOP_GRACE_S = 0.2
"""Sessions have so long to send what they still hold."""


class Loop(Protocol):
    """A rank's engine thread. May be used from any thread."""

    load: Load
    is_draining: bool
    """Set by `RankWorker.drain`: no new work is taken."""

    @property
    def is_idle(self) -> bool:
        """Nothing is left of what was taken."""
        ...

    def session_closed(self, outbox: Outbox) -> None:
        """Cancel everything that came over a session."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Which rank of its role it is, and where it listens."""

    host: str = "127.0.0.1"
    port: int = 0
    """0: any free one."""
    replica: int = 0
    rank: int = 0

    def member(self, role: str, port: int, metrics_address: str, layout: KVLayout, max_model_len: int) -> Member:
        """A new life of the rank."""
        return Member(
            role=role,
            replica=self.replica,
            rank=self.rank,
            address=f"{self.host}:{port}",
            incarnation=new_incarnation(),
            fingerprint=layout.fingerprint(),
            max_model_len=max_model_len,
            metrics_address=metrics_address,
        )


class RankWorker:
    """One life of one rank: start once, stop once. A role says in `_open` what it is made of."""

    member: Member
    _loop: Loop

    def __init__(self, place: Place) -> None:
        self._place = place
        self._parts = contextlib.AsyncExitStack()
        """Ends what was started, the latest first."""

    async def start(self) -> Member:
        """Ready when it returns. Raises ConfigError and its kin, and then leaves nothing behind."""
        host = self._place.host
        try:
            listener = Listener(host, self._place.port)
            self._parts.push_async_callback(listener.stop, STOP_GRACE_S)
            registry = new_registry()
            endpoint = MetricsEndpoint(registry, host)
            self._parts.push_async_callback(asyncio.to_thread, endpoint.close)
            await self._open(listener, registry, endpoint.address)
            await listener.start()
            self._parts.push_async_callback(listener.stop, STOP_GRACE_S)  # no command comes any more while the parts end
        except BaseException:
            await self.stop()
            raise
        log.info("rank.ready", member=self.member.name, address=self.member.address, incarnation=self.member.incarnation)
        return self.member

    async def _open(self, listener: Listener, registry: CollectorRegistry, metrics_address: str) -> None:
        """Set `member` and `_loop`, add services to the listener, and push onto `_parts` whatever has to be ended."""
        raise NotImplementedError

    def load(self) -> Load:
        return self._loop.load

    def note(self) -> str:
        """What `baton status` says of it, if anything."""
        return ""

    async def drain(self, deadline_s: float) -> bool:
        """Take no new work; True when none is left, False at the deadline."""
        self._loop.is_draining = True
        end = asyncio.get_running_loop().time() + deadline_s
        while not self._loop.is_idle and asyncio.get_running_loop().time() < end:
            await asyncio.sleep(0.05)
        return self._loop.is_idle

    async def stop(self) -> None:
        """End everything; whatever was running is lost to its routers, which run it again elsewhere. Harmless when not started."""
        await self._parts.aclose()


class RouterSessions:
    """A rank's sessions, one a router: hello both ways, then commands in and an update a step out, until either side ends it."""

    def __init__(self, update: Callable[..., Any], member: Member, loop: Loop, liveness_timeout_s: float) -> None:
        """`update`: the message type of this role."""
        self._update, self._member, self._loop, self._timeout_s = update, member, loop, liveness_timeout_s

    async def serve(self, commands: AsyncIterator[Any], context: grpc.aio.ServicerContext, handle: Callable[[Any, Outbox], None]) -> None:
        """One session. `handle` takes each command, with the outbox for what is to be said about it. The commands of a router that has
        left, is silent or does not read are cancelled."""
        first = await first_message(commands, self._timeout_s)
        if first is None or first.hello.wire_version != WIRE_VERSION:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"a session begins with hello of wire version {WIRE_VERSION}")
        assert first is not None
        router, outbox = first.hello.name, Outbox(self._update, asyncio.get_running_loop())
        log.info("session.opened", router=router)
        hello = common_pb2.Hello(
            wire_version=WIRE_VERSION, name=self._member.name, incarnation=self._member.incarnation, member=encode_member(self._member)
        )
        outbox.post(self._update(hello=hello))

        reason = ""
        try:
            await serve_session(commands, context.write, outbox, partial(self._take, handle, outbox), self.finish, self._timeout_s)
        except Unavailable as error:
            reason = str(error)
        finally:
            log.info("session.closed", router=router, reason=reason or "the router left")
            self._loop.session_closed(outbox)
        if reason:
            await context.abort(grpc.StatusCode.UNAVAILABLE, reason)

    def _take(self, handle: Callable[[Any, Outbox], None], outbox: Outbox, command: Any) -> None:
        handle(command, outbox)
        if command.ping:
            outbox.post(self._update(pong=command.ping))

    def finish(self, update: Any) -> None:
        """Add what every update carries."""
        update.load.CopyFrom(encode_load(self._loop.load))
        update.draining = self._loop.is_draining

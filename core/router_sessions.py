"""RouterSessions: a rank's sessions with routers, one each. What a router orders is in `server.py` of the rank's folder."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import grpc.aio

from core.codec import encode_member, write_load
from core.errors import Unavailable
from core.kv_layout import WIRE_VERSION
from core.log import get_logger
from core.rank_worker import Loop
from core.request import Member
from core.session import Outbox, first_message, serve_session
from protos import common_pb2

log = get_logger("rank")


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
            await serve_session(commands, context.write, outbox, lambda command: handle(command, outbox), self.finish, self._timeout_s)
        except Unavailable as error:
            reason = str(error)
        finally:
            log.info("session.closed", router=router, reason=reason or "the router left")
            self._loop.session_closed(outbox)
        if reason:
            await context.abort(grpc.StatusCode.UNAVAILABLE, reason)

    def finish(self, update: Any) -> None:
        """Add what every update carries."""
        write_load(self._loop.load, update.load)
        update.draining = self._loop.is_draining

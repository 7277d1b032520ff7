"""The decode rank's gRPC service: one session a router."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from functools import partial

import grpc
import grpc.aio

from core.codec import decode_request, encode_failure, encode_load, encode_member
from core.errors import InvalidRequest, Unavailable
from core.kv_layout import WIRE_VERSION
from core.log import get_logger
from core.request import Member
from core.session import Outbox, first_message, serve_session
from decode_worker.loop import DecodeLoop
from protos import common_pb2, decode_pb2, decode_pb2_grpc

log = get_logger("decode")


class DecodeService(decode_pb2_grpc.DecodeServicer):
    def __init__(self, loop: DecodeLoop, member: Member, liveness_timeout_s: float) -> None:
        self._loop, self._member, self._timeout_s = loop, member, liveness_timeout_s

    async def Session(self, requests: AsyncIterator[decode_pb2.DecodeCommand], context: grpc.aio.ServicerContext) -> None:
        first = await first_message(requests, self._timeout_s)
        if first is None or first.hello.wire_version != WIRE_VERSION:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"a session begins with hello of wire version {WIRE_VERSION}")
        assert first is not None
        router = first.hello.name
        outbox = Outbox(decode_pb2.DecodeUpdate, asyncio.get_running_loop())
        log.info("session.opened", router=router)
        hello = common_pb2.Hello(
            wire_version=WIRE_VERSION,
            name=self._member.name,
            incarnation=self._member.incarnation,
            member=encode_member(self._member),
        )
        outbox.post(decode_pb2.DecodeUpdate(hello=hello))

        reason = ""
        try:
            await serve_session(requests, context.write, outbox, partial(self.handle, outbox=outbox), self.finish, self._timeout_s)
        except Unavailable as error:
            reason = str(error)
        finally:
            log.info("session.closed", router=router, reason=reason or "the router left")
            self._loop.session_closed(outbox)
        if reason:
            await context.abort(grpc.StatusCode.UNAVAILABLE, reason)

    def handle(self, command: decode_pb2.DecodeCommand, outbox: Outbox) -> None:
        """What a router said; the outbox is its session's."""
        cancelled = frozenset(command.cancels)
        if cancelled:
            self._loop.cancel(cancelled, outbox)
        for request in command.reserves:
            if request.request_id not in cancelled:
                self._reserve(request, outbox)
        if command.ping:
            outbox.post(decode_pb2.DecodeUpdate(pong=command.ping))

    def _reserve(self, request: common_pb2.Request, outbox: Outbox) -> None:
        try:
            self._loop.reserve(decode_request(request), outbox)
        except InvalidRequest as error:  # ends this request, not the session
            outbox.post(decode_pb2.DecodeUpdate(failures=[encode_failure(request.request_id, error)]))

    def finish(self, update: decode_pb2.DecodeUpdate) -> None:
        """What every update carries."""
        update.load.CopyFrom(encode_load(self._loop.load))
        update.draining = self._loop.is_draining

"""The prefill rank's gRPC service: one session a router."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from functools import partial

import grpc
import grpc.aio

from core.codec import decode_request, decode_reservation, encode_failure, encode_load, encode_member
from core.errors import InvalidRequest, Unavailable
from core.kv_layout import WIRE_VERSION
from core.log import get_logger
from core.request import Member
from core.session import Outbox, first_message, serve_session
from prefill_worker.loop import PrefillLoop
from protos import common_pb2, prefill_pb2, prefill_pb2_grpc

log = get_logger("prefill")


class PrefillService(prefill_pb2_grpc.PrefillServicer):
    def __init__(self, loop: PrefillLoop, member: Member, liveness_timeout_s: float) -> None:
        self._loop, self._member, self._timeout_s = loop, member, liveness_timeout_s

    async def Session(self, requests: AsyncIterator[prefill_pb2.PrefillCommand], context: grpc.aio.ServicerContext) -> None:
        first = await first_message(requests, self._timeout_s)
        if first is None or first.hello.wire_version != WIRE_VERSION:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"a session begins with hello of wire version {WIRE_VERSION}")
        assert first is not None
        router = first.hello.name
        outbox = Outbox(prefill_pb2.PrefillUpdate, asyncio.get_running_loop())
        log.info("session.opened", router=router)
        hello = common_pb2.Hello(
            wire_version=WIRE_VERSION,
            name=self._member.name,
            incarnation=self._member.incarnation,
            member=encode_member(self._member),
        )
        outbox.post(prefill_pb2.PrefillUpdate(hello=hello))

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

    def handle(self, command: prefill_pb2.PrefillCommand, outbox: Outbox) -> None:
        """What a router said; the outbox is its session's."""
        cancelled = frozenset(command.cancels)
        if cancelled:
            self._loop.cancel(cancelled, outbox)
        for run in command.runs:
            if run.request.request_id not in cancelled:
                self._run(run, outbox)
        for hand_on in command.hand_ons:
            if hand_on.request_id not in cancelled:
                self._loop.hand_on(hand_on.request_id, decode_reservation(hand_on.reservation), outbox)
        if command.ping:
            outbox.post(prefill_pb2.PrefillUpdate(pong=command.ping))

    def _run(self, run: prefill_pb2.PrefillRun, outbox: Outbox) -> None:
        try:
            self._loop.run(decode_request(run.request), decode_reservation(run.reservation), outbox)
        except InvalidRequest as error:  # ends this request, not the session
            outbox.post(prefill_pb2.PrefillUpdate(failures=[encode_failure(run.request.request_id, error)]))

    def finish(self, update: prefill_pb2.PrefillUpdate) -> None:
        """What every update carries."""
        update.load.CopyFrom(encode_load(self._loop.load))
        update.draining = self._loop.is_draining

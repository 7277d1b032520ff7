"""The prefill rank's gRPC service: what routers order."""

from __future__ import annotations

from collections.abc import AsyncIterator

import grpc.aio

from core.codec import decode_request, decode_reservation, encode_failure
from core.errors import InvalidRequest
from core.request import Member
from core.router_sessions import RouterSessions
from core.session import Outbox
from prefill_worker.loop import PrefillLoop
from protos import prefill_pb2, prefill_pb2_grpc


class PrefillService(prefill_pb2_grpc.PrefillServicer):
    def __init__(self, loop: PrefillLoop, member: Member, liveness_timeout_s: float) -> None:
        self._loop = loop
        self.sessions = RouterSessions(prefill_pb2.PrefillUpdate, member, loop, liveness_timeout_s)

    async def Session(self, requests: AsyncIterator[prefill_pb2.PrefillCommand], context: grpc.aio.ServicerContext) -> None:
        await self.sessions.serve(requests, context, self.handle)

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

    def _run(self, run: prefill_pb2.PrefillRun, outbox: Outbox) -> None:
        try:
            self._loop.run(decode_request(run.request), decode_reservation(run.reservation), outbox)
        except InvalidRequest as error:  # ends this request, not the session
            outbox.post(prefill_pb2.PrefillUpdate(failures=[encode_failure(run.request.request_id, error)]))

"""The decode rank's gRPC service: what routers order."""

from __future__ import annotations

from collections.abc import AsyncIterator

import grpc.aio

from core.codec import decode_request, encode_failure
from core.errors import InvalidRequest
from core.request import Member
from core.router_sessions import RouterSessions
from core.session import Outbox
from decode_worker.loop import DecodeLoop
from protos import common_pb2, decode_pb2, decode_pb2_grpc


class DecodeService(decode_pb2_grpc.DecodeServicer):
    def __init__(self, loop: DecodeLoop, member: Member, liveness_timeout_s: float) -> None:
        self._loop = loop
        self.sessions = RouterSessions(decode_pb2.DecodeUpdate, member, loop, liveness_timeout_s)

    async def Session(self, requests: AsyncIterator[decode_pb2.DecodeCommand], context: grpc.aio.ServicerContext) -> None:
        await self.sessions.serve(requests, context, self.handle)

    def handle(self, command: decode_pb2.DecodeCommand, outbox: Outbox) -> None:
        """What a router said; the outbox is its session's."""
        cancelled = frozenset(command.cancels)
        if cancelled:
            self._loop.cancel(cancelled, outbox)
        for request in command.reserves:
            if request.request_id not in cancelled:
                self._reserve(request, outbox)

    def _reserve(self, request: common_pb2.Request, outbox: Outbox) -> None:
        try:
            self._loop.reserve(decode_request(request), outbox)
        except InvalidRequest as error:  # ends this request, not the session
            outbox.post(decode_pb2.DecodeUpdate(failures=[encode_failure(request.request_id, error)]))

"""The router's side of a session with one rank: commands out, one update a step in, fanned out to requests.

A session lives as long as the rank's incarnation is a member; when the stream breaks, every request that was using it gets
MemberLost, and the stream is opened again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc.aio

from core.codec import (
    decode_error,
    decode_load,
    decode_logprobs,
    decode_reservation,
    decode_stages,
    decode_tokens,
    encode_request,
    encode_reservation,
)
from core.errors import BatonError, MemberLost
from core.kv_layout import WIRE_VERSION
from core.log import get_logger
from core.request import Load, Member, Request, Reservation, TokenLogprobs, Tokens
from core.rpc import PING_INTERVAL_S, new_channel
from protos import common_pb2, decode_pb2, decode_pb2_grpc, prefill_pb2, prefill_pb2_grpc

log = get_logger("router")

MERGED_BYTES = 2**20
"""Commands that wait go out as one message, up to about this size."""


@dataclass(frozen=True, slots=True)
class Reserved:
    reservation: Reservation


@dataclass(frozen=True, slots=True)
class PromptScored:
    """Log-probabilities of prompt tokens [start, start + len)."""

    start: int
    logprobs: tuple[TokenLogprobs, ...]


@dataclass(frozen=True, slots=True)
class FirstToken:
    tokens: Tokens
    stages: dict[str, float]


@dataclass(frozen=True, slots=True)
class HandedOff:
    """Everything is in the decode rank's memory. `reserved_as`: Reservation.request_id."""

    reserved_as: str
    stages: dict[str, float]


@dataclass(frozen=True, slots=True)
class HandOffFailed:
    """The prefill rank keeps what it computed."""

    reserved_as: str
    error: BatonError


@dataclass(frozen=True, slots=True)
class Decoded:
    tokens: Tokens


@dataclass(frozen=True, slots=True)
class Finished:
    stages: dict[str, float]


@dataclass(frozen=True, slots=True)
class Failed:
    """`role` says which side of the request failed."""

    role: str
    error: BatonError


Event = Reserved | PromptScored | FirstToken | HandedOff | HandOffFailed | Decoded | Finished | Failed
Listener = Callable[[Event], None]


class RankSession:
    """Owner of the stream to one rank. `listen` before sending anything for a request, `forget` when done with it."""

    def __init__(self, member: Member, router_name: str, liveness_timeout_s: float) -> None:
        self.member = member
        self.load = Load()
        self.in_flight: dict[str, int] = {}
        """Request id -> prompt tokens: what was sent there and has not ended; counts before the rank's own report does."""
        self.unanswered: dict[str, int] = {}
        """As `in_flight`, of reservations that were asked for and are neither granted nor given up."""
        self.is_connected = False
        self.is_draining = member.state == "draining"
        self._router_name, self._timeout_s = router_name, liveness_timeout_s
        self._listeners: dict[str, Listener] = {}
        self._outgoing: asyncio.Queue[Any] = asyncio.Queue()
        self._task = asyncio.create_task(self._run())

    @property
    def is_ready(self) -> bool:
        return self.is_connected and not self.is_draining

    def listen(self, request_id: str, num_tokens: int, listener: Listener) -> None:
        self._listeners[request_id] = listener
        self.in_flight[request_id] = num_tokens

    def forget(self, request_id: str) -> None:
        self._listeners.pop(request_id, None)
        self.in_flight.pop(request_id, None)
        self.unanswered.pop(request_id, None)

    def reserve(self, request: Request) -> None:
        self._send(decode_pb2.DecodeCommand(reserves=[encode_request(request)]))
        self.unanswered[request.request_id] = len(request.token_ids)

    def run(self, request: Request, reservation: Reservation) -> None:
        run = prefill_pb2.PrefillRun(request=encode_request(request), reservation=encode_reservation(reservation))
        self._send(prefill_pb2.PrefillCommand(runs=[run]))

    def hand_on(self, request_id: str, reservation: Reservation) -> None:
        """What a prefill rank has and will have computed of this request goes under this reservation from now on."""
        hand_on = prefill_pb2.HandOn(request_id=request_id, reservation=encode_reservation(reservation))
        self._send(prefill_pb2.PrefillCommand(hand_ons=[hand_on]))

    def cancel(self, request_id: str) -> None:
        """Harmless for requests that have ended. A broken session has cancelled everything already."""
        if self.is_connected:
            self._send(self._command(cancels=[request_id]))

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._lose("the session was closed")

    def _command(self, **fields: Any) -> Any:
        kind = prefill_pb2.PrefillCommand if self.member.role == "prefill" else decode_pb2.DecodeCommand
        return kind(**fields)

    def _send(self, command: Any) -> None:
        if not self.is_connected:
            raise MemberLost(f"no session with {self.member.name}")
        self._outgoing.put_nowait(command)

    async def _run(self) -> None:
        while True:
            try:
                reason = await self._connect_once()
            except Exception as error:  # outermost: whatever it is, it ends this session only
                log.exception("member.broken", member=self.member.name)
                reason = repr(error)
            if self.is_connected:
                log.warning("member.lost", member=self.member.name, incarnation=self.member.incarnation, reason=reason)
            self._lose(reason)
            await asyncio.sleep(0.3)

    async def _connect_once(self) -> str:
        """One stream from hello to its end; returns why it ended."""
        channel = new_channel(self.member.address)
        self._outgoing = asyncio.Queue()
        try:
            stub = prefill_pb2_grpc.PrefillStub(channel) if self.member.role == "prefill" else decode_pb2_grpc.DecodeStub(channel)
            call = stub.Session()
            await call.write(self._command(hello=common_pb2.Hello(wire_version=WIRE_VERSION, name=self._router_name)))
            async with asyncio.timeout(self._timeout_s):
                update = await call.read()
            if update is grpc.aio.EOF or update.hello.incarnation != self.member.incarnation:
                return "another incarnation answers at its address"
            self.is_connected = True
            log.info("member.connected", member=self.member.name, incarnation=self.member.incarnation)
            writer = asyncio.create_task(self._write(call))
            try:
                while update is not grpc.aio.EOF:
                    self._dispatch(update)
                    async with asyncio.timeout(self._timeout_s):
                        update = await call.read()
            finally:
                writer.cancel()
            return "the rank closed the session"
        except TimeoutError:
            return f"nothing heard for {self._timeout_s:g} s"
        except grpc.aio.AioRpcError as error:
            return f"{error.code().name}: {error.details()}"
        finally:
            await channel.close()

    async def _write(self, call: Any) -> None:
        """Ends quietly when the call does; the reader says why."""
        while True:
            try:
                async with asyncio.timeout(PING_INTERVAL_S):
                    command = await self._outgoing.get()
            except TimeoutError:
                command = self._command()
            while not self._outgoing.empty() and command.ByteSize() < MERGED_BYTES:
                command.MergeFrom(self._outgoing.get_nowait())
            try:
                await call.write(command)
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
                return

    def _dispatch(self, update: Any) -> None:
        self.load, self.is_draining = decode_load(update.load), update.draining
        for failure in update.failures:
            self._tell(failure.request_id, Failed(self.member.role, decode_error(failure.error)))
        if self.member.role == "decode":
            for reserved in update.reserved:
                self.unanswered.pop(reserved.request_id, None)
                self._tell(reserved.request_id, Reserved(decode_reservation(reserved.reservation)))
            for finished in update.finished:
                self._tell(finished.request_id, Finished(decode_stages(finished.stages)))
            for tokens in update.tokens:
                self._tell(tokens.request_id, Decoded(decode_tokens(tokens)))
            return
        for scored in update.prompt_logprobs:
            self._tell(scored.request_id, PromptScored(scored.start, decode_logprobs(scored.logprobs)))
        for first in update.first_tokens:
            self._tell(first.tokens.request_id, FirstToken(decode_tokens(first.tokens), decode_stages(first.stages)))
        for done in update.handed_off:
            self._tell(done.request_id, HandedOff(done.reserved_as, decode_stages(done.stages)))
        for lost in update.hand_offs_failed:
            self._tell(lost.request_id, HandOffFailed(lost.reserved_as, decode_error(lost.error)))

    def _tell(self, request_id: str, event: Event) -> None:
        listener = self._listeners.get(request_id)
        if listener is not None:
            listener(event)

    def _lose(self, reason: str) -> None:
        self.is_connected = False
        for request_id in list(self._listeners):
            self._tell(request_id, Failed(self.member.role, MemberLost(f"{self.member.name} is lost: {reason}")))

"""KVReceiver: the edge around `receiver.Receiver`: one thread that owns the transport, and the servicer of the senders' sessions.

Events (`Committed`, `Quiesced`, `SenderLost`, `Renewed`) are called from the thread.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from functools import partial
from typing import Any

import grpc.aio
from google.protobuf.message import DecodeError

from core.clock import Clock
from core.codec import encode_error, encode_region
from core.errors import BatonError, Mismatch, Unavailable
from core.inbox import InboxThread
from core.kv_layout import WIRE_VERSION, KVLayout
from core.log import get_logger
from core.region import Region
from core.request import Member
from core.session import Outbox, first_message, serve_session
from kv_transfer.checksum import checksum
from kv_transfer.config import TransferConfig
from kv_transfer.ending import Answer, ask
from kv_transfer.lanes import this_machine
from kv_transfer.metrics import ReceiverMetrics
from kv_transfer.own_transport import OwnTransport
from kv_transfer.receiver import (
    Action,
    Arrived,
    Ask,
    Committed,
    Fence,
    HangUp,
    Live,
    Origin,
    Quiesced,
    Receiver,
    Release,
    Renewed,
    Revoke,
    SenderLost,
)
from kv_transfer.session import check_peer
from protos import common_pb2, transfer_pb2, transfer_pb2_grpc

log = get_logger("receiver")

TICK_S = 0.25
"""How often deadlines are looked at, and an idle transport is polled."""

ASK_TIMEOUT_S = 1.0
"""How long a sender may take to say whether it is over with a session."""

Event = Committed | Quiesced | SenderLost | Renewed


@dataclass(slots=True)
class _Session:
    key: str
    origin: Origin
    outbox: Outbox
    ping: int = 0


class KVReceiver(transfer_pb2_grpc.TransferServicer):
    def __init__(
        self,
        config: TransferConfig,
        layout: KVLayout,
        pages: Region,
        slots: Region,
        member: Member,
        clock: Clock,
        metrics: ReceiverMetrics,
        on_event: Callable[[Event], None],
        on_death: Callable[[str], None],
    ) -> None:
        """`on_death(reason)`: the thread cannot go on, and nothing will be received any more."""
        self._config, self._layout, self._member, self._clock, self._metrics = config, layout, member, clock, metrics
        self._on_event, self._on_death = on_event, on_death
        self._pages, self._slots = pages, slots
        answer_s = config.write_timeout_s + config.quarantine_s  # a sender gives a stuck write up before that
        self._state = Receiver(
            incarnation=member.incarnation,
            quarantine_s=config.quarantine_s,
            drain_s=config.quarantine_s - config.liveness_timeout_s,  # what the quarantine has for it
            answer_s=answer_s,
        )
        self._places: dict[int, tuple[tuple[int, ...], int]] = {}
        """Epoch -> page ids and slot id, for checked mode."""
        self._sessions: dict[str, _Session] = {}
        """Added and removed on the event loop, read by the thread."""
        self._num_sessions = 0
        self._thread = InboxThread("kv-receiver", self._turn, self._died)
        self._own = OwnTransport(self._thread, config, member, pages, slots)
        self._next_tick = clock.now() + TICK_S
        self._tasks: set[asyncio.Task[None]] = set()

    # -- for the worker --------------------------------------------------------------------------------------------------------

    def add_to(self, server: grpc.aio.Server) -> None:
        transfer_pb2_grpc.add_TransferServicer_to_server(self, server)

    async def start(self) -> None:
        """To be called on the worker's event loop, where the sessions will run. Raises what keeps the transport from starting."""
        self._loop = asyncio.get_running_loop()
        await self._own.start()

    async def close(self) -> None:
        for session in list(self._sessions.values()):
            session.outbox.close()
        await self._own.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def thread(self) -> InboxThread:
        """For whoever watches that it does not stand still."""
        return self._thread

    def expect(self, epoch: int, request_id: str, page_ids: tuple[int, ...], slot_id: int, num_tokens: int) -> None:
        """Let a sender open this epoch."""

        def expected() -> None:
            self._places[epoch] = (page_ids, slot_id)
            self._state.expect(epoch, request_id, len(page_ids), num_tokens)

        self._thread.put(expected)

    def release(self, epoch: int) -> None:
        """The sequence took its first step: its sender may free its pages."""

        def released() -> list[Action]:
            self._places.pop(epoch, None)
            return self._state.release(epoch)

        self._order(released)

    def revoke(self, epoch: int) -> None:
        """Have the sender stop. Quiesced follows when nothing of it can land any more."""
        self._order(lambda: self._state.revoke(epoch, self._clock.now()))

    # -- the thread ------------------------------------------------------------------------------------------------------------

    def _order(self, order: Callable[[], list[Action]]) -> None:
        self._thread.put(lambda: self._perform(order()))

    def _turn(self) -> float:
        now = self._clock.now()
        if self._state.num_open or now >= self._next_tick:
            for note in self._own.transport.poll().notifications:
                self._perform(self._commit(note))
        if now >= self._next_tick:
            self._next_tick = now + TICK_S
            self._perform(self._state.tick(now))
            self._metrics.open_epochs.set(self._state.num_open)
            self._metrics.quarantined.set(self._state.num_quarantined_pages)
        return self._config.poll_interval_ms / 1000 if self._state.num_open else TICK_S

    def _died(self, error: Exception) -> None:
        """Who may write where can no longer be told."""
        log.exception("receiver.died", error=repr(error))
        self._own.transport.close()
        self._on_death(f"kv receiver: {error!r}")

    def _commit(self, note: bytes) -> list[Action]:
        try:
            wire = transfer_pb2.Commit.FromString(note)
        except DecodeError:
            log.error("transfer.commit_void", reason="not a commit", num_bytes=len(note))
            self._metrics.commits.labels("void").inc()
            return []
        session = next((s for s in list(self._sessions.values()) if s.origin.incarnation == wire.sender_incarnation), None)
        arrived = Arrived(
            epoch=wire.epoch,
            receiver_incarnation=wire.decode_incarnation,
            sender=session.key if session is not None else "",
            request_id=wire.request_id,
            num_tokens=wire.num_tokens,
            num_pages=wire.num_pages,
            first_token=wire.first_token,
        )
        void = self._state.why_void(arrived)
        if void is not None:
            log.warning("transfer.commit_void", request_id=wire.request_id, epoch=wire.epoch, reason=void)
            self._metrics.commits.labels("void").inc()
            return []
        wrong = self._wrong_pieces(wire)
        if wrong:
            log.error("transfer.corrupt", request_id=wire.request_id, epoch=wire.epoch, pieces=wrong[:8])
            self._metrics.commits.labels("corrupt").inc()
            return self._state.reject(wire.epoch, f"{len(wrong)} pieces arrived with another checksum", self._clock.now())
        self._metrics.commits.labels("accepted").inc()
        log.debug("transfer.committed", request_id=wire.request_id, epoch=wire.epoch)
        return self._state.commit(arrived)

    def _wrong_pieces(self, wire: transfer_pb2.Commit) -> list[int]:
        """Positions of pages (and, last, the slot) that are not what the commit says; all of them if checked mode finds no checksums."""
        if not self._config.checksum:
            return []
        pages, slot = self._places[wire.epoch]
        found = [checksum(self._pages, page) for page in pages] + [checksum(self._slots, slot)]
        if len(found) != len(wire.checksums):
            return list(range(len(found)))
        return [place for place, (mine, theirs) in enumerate(zip(found, wire.checksums, strict=True)) if mine != theirs]

    def _perform(self, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, (Live, Revoke, Release)):
                session = self._sessions.get(action.sender)
                if session is not None:
                    message = transfer_pb2.ReceiverMessage()
                    getattr(message, {Live: "live", Revoke: "revoked", Release: "released"}[type(action)]).append(action.epoch)
                    session.outbox.post(message)
            elif isinstance(action, HangUp):
                log.error("transfer.hung_up", sender=action.sender, reason=action.reason)
                self._hang_up(action.sender)
            elif isinstance(action, Ask):
                self._loop.call_soon_threadsafe(self._ask, action)
            elif isinstance(action, Fence):
                log.warning("transfer.fenced", reason="a lost sender may be stopped; the transport is reset, all sessions begin anew")
                self._metrics.fences.inc()
                self._own.reset()
                for key in list(self._sessions):
                    self._hang_up(key)
            else:
                if isinstance(action, Quiesced):
                    self._places.pop(action.epoch, None)
                self._on_event(action)

    def _hang_up(self, key: str) -> None:
        session = self._sessions.get(key)
        if session is not None:
            self._loop.call_soon_threadsafe(session.outbox.close)

    # -- the sessions, on the event loop -----------------------------------------------------------------------------------------

    async def Session(self, requests: AsyncIterator[transfer_pb2.SenderMessage], context: grpc.aio.ServicerContext) -> None:
        first = await first_message(requests, self._config.liveness_timeout_s)
        try:
            hello = self._check_hello(first)
        except BatonError as error:
            log.warning("transfer.refused", reason=str(error))
            await context.write(transfer_pb2.ReceiverMessage(refused=encode_error(error)))
            return
        session = self._begin(hello)
        self._start(self._reach(session))

        reason = "the session ended"
        try:
            await context.write(transfer_pb2.ReceiverMessage(hello=self._hello()))
            await serve_session(
                requests,
                context.write,
                session.outbox,
                partial(self._take, session),
                partial(self._finish, session),
                self._config.liveness_timeout_s,
            )
        except Unavailable as error:
            reason = str(error)
        finally:
            self._end(session, reason)

    def _take(self, session: _Session, message: transfer_pb2.SenderMessage) -> None:
        if session.key not in self._sessions:
            return  # over: a ping must not be answered any more
        session.ping = message.ping
        if message.renew or message.last_write_out:
            self._order(lambda: self._heard(session.key, message))

    def _finish(self, session: _Session, update: transfer_pb2.ReceiverMessage) -> None:
        if session.ping:
            update.pong = session.ping

    def _hello(self) -> transfer_pb2.ReceiverHello:
        return transfer_pb2.ReceiverHello(
            hello=common_pb2.Hello(wire_version=WIRE_VERSION, name=self._member.name, incarnation=self._member.incarnation),
            kv_layout=self._layout.to_json(),
            agent=self._own.agent,
            pages=encode_region(self._pages),
            slots=encode_region(self._slots),
            machine=this_machine().identity,
        )

    def _check_hello(self, message: transfer_pb2.SenderMessage | None) -> transfer_pb2.SenderHello:
        """Raises Mismatch naming what differs."""
        if message is None or not message.HasField("hello"):
            raise Mismatch("a transfer session begins with hello")
        hello = message.hello.hello
        if message.hello.transport != self._config.transport:
            raise Mismatch(f"transport {message.hello.transport!r} of {hello.name}, {self._config.transport!r} here")
        check_peer(self._layout, hello, message.hello.kv_layout)
        return message.hello

    def _begin(self, hello: transfer_pb2.SenderHello) -> _Session:
        """A new session of the same life of a sender takes the place of an older one."""
        name, incarnation = hello.hello.name, hello.hello.incarnation
        for older in [session for session in self._sessions.values() if session.origin.incarnation == incarnation]:
            self._end(older, "its sender began another session")
        self._num_sessions += 1
        key = f"{name}#{incarnation}/{self._num_sessions}"
        outbox = Outbox(transfer_pb2.ReceiverMessage, self._loop)
        session = self._sessions[key] = _Session(key, Origin(hello.address, incarnation, hello.link, was_reached=False), outbox)
        log.info("transfer.session_opened", sender=key)
        return session

    def _end(self, session: _Session, reason: str) -> None:
        session.outbox.close()
        if self._sessions.pop(session.key, None) is None:
            return
        log.warning("transfer.sender_lost", sender=session.key, reason=reason)
        self._metrics.senders_lost.inc()
        self._order(lambda: self._state.sender_lost(session.key, session.origin, self._clock.now()))

    async def _reach(self, session: _Session) -> None:
        """Learn, while the sender lives, whether it is itself that answers at its address. It may be busy when a session begins."""
        is_told = False
        while (answer := await ask(dataclasses.replace(session.origin, link=""), ASK_TIMEOUT_S)) is not Answer.OVER:
            if not is_told:
                log.warning("transfer.unreachable", sender=session.key, address=session.origin.address, answer=answer.value)
            is_told = True
            await asyncio.sleep(ASK_TIMEOUT_S)
            if self._sessions.get(session.key) is not session:
                return
        session.origin = dataclasses.replace(session.origin, was_reached=True)

    def _ask(self, action: Ask) -> None:
        async def asked() -> None:
            self._answered(action, await ask(action.origin, ASK_TIMEOUT_S))

        self._start(asked())

    def _answered(self, action: Ask, answer: Answer) -> None:
        is_over = answer.is_proof(action.origin)
        log.info("transfer.asked", sender=action.sender, answer=answer.value, is_over=is_over)
        self._thread.put(lambda: self._state.answered(action.sender, is_over, self._clock.now()))

    def _start(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _heard(self, sender: str, message: transfer_pb2.SenderMessage) -> list[Action]:
        actions: list[Action] = []
        for epoch in message.renew:
            actions += self._state.renew(sender, epoch)
        for epoch in message.last_write_out:
            actions += self._state.last_write_out(sender, epoch)
        return actions

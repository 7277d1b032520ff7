"""KVSender: the edge around `sender.Sender`: one thread that owns the transport, and one session a peer on the worker's event loop.

The worker's calls return at once; what happens comes back as `HandedOff` and `Closed` events, called from the thread.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
from collections.abc import Callable

import grpc.aio

from core.clock import Clock
from core.codec import decode_region
from core.errors import BatonError, MemberLost
from core.inbox import InboxThread
from core.kv_layout import KVLayout
from core.log import get_logger
from core.region import Region
from core.request import Member, MemberKey, Reservation
from kv_transfer.checksum import checksum
from kv_transfer.config import TransferConfig
from kv_transfer.lanes import this_machine
from kv_transfer.link_report import LinkReport
from kv_transfer.metrics import SenderMetrics
from kv_transfer.own_transport import OwnTransport
from kv_transfer.sender import Action, Closed, CommitOrder, Drop, HandedOff, LastWriteOut, Limits, Post, Renew, Reset, Sender
from kv_transfer.session import PeerSession, Speaker
from kv_transfer.transport import Write
from protos import transfer_pb2, transfer_pb2_grpc

log = get_logger("sender")

TICK_S = 0.25
"""How often leases and deadlines are looked at, and an idle transport is polled."""

SHORT_POLLS, SHORT_POLL_S = 10, 2e-5
"""So many polls after a write was begun follow each other at once: most writes are out by then, and it is the polls that move them on."""


class KVSender(transfer_pb2_grpc.EndingServicer):
    def __init__(
        self,
        config: TransferConfig,
        layout: KVLayout,
        pages: Region,
        slots: Region,
        member: Member,
        clock: Clock,
        metrics: SenderMetrics,
        on_event: Callable[[HandedOff | Closed], None],
        on_death: Callable[[str], None],
    ) -> None:
        """`on_death(reason)`: the thread cannot go on, and nothing will be sent any more."""
        self._config, self._member, self._clock, self._metrics = config, member, clock, metrics
        self._speaker = Speaker(
            member=member, layout=layout, transport=config.transport, liveness_timeout_s=config.liveness_timeout_s, clock=clock
        )
        self._on_event, self._on_death = on_event, on_death
        self._pages, self._slots = pages, slots
        self._state = Sender(
            Limits(
                page_bytes=pages.piece_bytes,
                slot_bytes=slots.piece_bytes,
                max_bytes_in_flight=config.max_bytes_in_flight,
                deadline_s=config.deadline_s,
                write_timeout_s=config.write_timeout_s,
                liveness_timeout_s=config.liveness_timeout_s,
                drain_s=config.tcp_user_timeout_s,
            )
        )
        self._sessions: dict[str, PeerSession] = {}
        """By link; owned by the thread."""
        self._links: dict[MemberKey, str] = {}
        """Member.key -> its latest link, while that is not dropped."""
        self._waiting: dict[str, str] = {}
        """Lost link that is not dropped -> the one that is to follow: there is one connection to a rank at a time."""
        self._num_links = 0
        self._writes: dict[int, str] = {}
        """Write id -> request."""
        self._report = LinkReport(metrics, this_machine(), pages.memory)
        self._thread = InboxThread("kv-sender", self._turn, self._died)
        self._own = OwnTransport(self._thread, config, member, pages, slots)
        self._next_tick = clock.now() + TICK_S
        self._num_short_polls = 0
        """Still to come."""
        self._tasks: set[asyncio.Task[None]] = set()

    # -- for the worker --------------------------------------------------------------------------------------------------------

    def add_to(self, server: grpc.aio.Server) -> None:
        """To answer receivers. Whoever ends the server calls `close` before: a port that is free is taken for the end of all writes."""
        transfer_pb2_grpc.add_EndingServicer_to_server(self, server)

    async def start(self) -> None:
        """To be called on the worker's event loop, where the sessions will run. Raises what keeps the transport from starting."""
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[None] = self._loop.create_future()
        """Done when the transport is closed."""
        await self._own.start()

    async def close(self) -> None:
        """End the thread and its transport, then all sessions. Hand-offs under way are lost to their receivers. May be called twice."""
        await self._own.close()
        if not self._ended.done():
            self._ended.set_result(None)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def thread(self) -> InboxThread:
        """For whoever watches that it does not stand still."""
        return self._thread

    @property
    def num_open(self) -> int:
        return self._state.num_open

    @property
    def links(self) -> str:
        """What the links to decode ranks travel over, in a line."""
        return self._report.summary

    def open(self, request_id: str, reservation: Reservation) -> None:
        """Begin a hand-off. Its pages may be pushed at once; Closed says when they may be freed."""
        self._order(lambda: self._open(request_id, reservation))

    def push_pages(self, request_id: str, first_page: int, local_page_ids: list[int]) -> None:
        """Pages first_page, first_page + 1, ... of the sequence are final."""
        self._thread.put(functools.partial(self._state.push, request_id, first_page, local_page_ids))

    def commit(self, request_id: str, order: CommitOrder) -> None:
        """All pages of the sequence, the last partial one included, have been pushed."""
        self._thread.put(functools.partial(self._state.commit, request_id, order, self._clock.now()))

    def abort(self, request_id: str) -> None:
        """Closed follows as soon as nothing of it is in flight."""
        self._order(lambda: self._state.abort(request_id))

    # -- the thread ------------------------------------------------------------------------------------------------------------

    def _order(self, order: Callable[[], list[Action]]) -> None:
        self._thread.put(lambda: self._perform(order()))

    def _turn(self) -> float:
        self._fence()
        now = self._clock.now()
        if self._state.needs_progress or now >= self._next_tick:
            self._poll()
        if now >= self._next_tick:
            self._next_tick = now + TICK_S
            self._perform(self._state.tick(now))
            self._metrics.open_hand_offs.set(self._state.num_open)
            self._metrics.bytes_in_flight.set(self._state.bytes_in_flight)
        self._write()
        if not self._state.needs_progress:
            return TICK_S
        interval_s = self._config.poll_interval_ms / 1000
        return min(SHORT_POLL_S, interval_s) if self._num_short_polls else interval_s

    def _died(self, error: Exception) -> None:
        """What is in flight can no longer be told."""
        log.exception("sender.died", error=repr(error))
        self._own.transport.close()
        self._on_death(f"kv sender: {error!r}")

    def _fence(self) -> None:
        self._perform(self._state.fence(self._clock.now()))

    def _poll(self) -> None:
        self._num_short_polls = max(self._num_short_polls - 1, 0)
        for write_id, succeeded in self._own.transport.poll().finished:
            request_id = self._writes.pop(write_id, None)
            if request_id is not None:
                log.debug("transfer.out", request_id=request_id, write_id=write_id, succeeded=succeeded)
                now, hand_off = self._clock.now(), self._state.hand_off(request_id)
                if succeeded and hand_off is not None and (flight := hand_off.in_flight.get(write_id)) is not None:
                    self._report.wrote(hand_off.peer, flight.num_bytes, now - flight.since)
                self._perform(self._state.write_finished(request_id, write_id, succeeded, now))

    def _write(self) -> None:
        while (post := self._state.next_post()) is not None:
            began = self._clock.now()
            try:
                write_id = self._own.transport.write(post.peer, self._as_write(post))
            except BatonError as error:
                self._perform(self._state.write_refused(post, error))
                continue
            self._writes[write_id] = post.request_id
            now, self._num_short_polls = self._clock.now(), SHORT_POLLS
            self._state.posted(post, write_id, now)
            self._metrics.written.inc(post.num_bytes)
            log.debug(
                "transfer.posted",
                request_id=post.request_id,
                write_id=write_id,
                num_pages=len(post.pages),
                has_slot=post.order is not None,
                num_bytes=post.num_bytes,
                seconds=now - began,
            )

    def _perform(self, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, Renew):
                self._tell(action.peer, transfer_pb2.SenderMessage(renew=action.epochs))
            elif isinstance(action, LastWriteOut):
                self._tell(action.peer, transfer_pb2.SenderMessage(last_write_out=[action.epoch]))
            elif isinstance(action, Drop):
                self._drop(action)
            elif isinstance(action, Reset):
                log.warning("transfer.reset", reason="writes to a lost receiver did not end")
                self._metrics.resets.inc()
                self._own.reset()
                self._writes.clear()
                self._perform(self._state.was_reset())
            else:
                if isinstance(action, Closed) and action.error is not None:
                    self._metrics.failures.labels(action.error.code).inc()
                self._on_event(action)

    def _tell(self, link: str, message: transfer_pb2.SenderMessage) -> None:
        session = self._sessions.get(link)
        if session is not None:
            self._loop.call_soon_threadsafe(session.outgoing.put_nowait, message)

    def _drop(self, drop: Drop) -> None:
        log.warning("transfer.peer_lost", peer=drop.peer, reason=drop.reason)
        self._metrics.peers_lost.inc()
        self._own.transport.disconnect(drop.peer)
        self._report.gone(drop.peer)
        session = self._sessions.pop(drop.peer)
        self._links = {member: link for member, link in self._links.items() if link != drop.peer}
        self._loop.call_soon_threadsafe(session.stop)
        following = self._waiting.pop(drop.peer, None)
        if following is not None:
            self._state.begin(following, self._clock.now())
            self._loop.call_soon_threadsafe(self._begin_session, self._sessions[following])

    def _as_write(self, post: Post) -> Write:
        if post.order is None:
            return Write(post.pages)
        hand_off = self._state.hand_off(post.request_id)
        assert hand_off is not None, f"{post.request_id} is not open"
        sums: list[int] = []
        if self._config.checksum:
            sums = [checksum(self._pages, local) for local, _ in hand_off.all_pages]
            sums.append(checksum(self._slots, post.order.local_slot_id))
        notification = transfer_pb2.Commit(
            epoch=hand_off.reservation.epoch,
            decode_incarnation=hand_off.reservation.decode.incarnation,
            sender_incarnation=self._member.incarnation,
            request_id=post.request_id,
            num_tokens=post.order.num_tokens,
            num_pages=len(hand_off.all_pages),
            first_token=post.order.first_token,
            checksums=sums,
        )
        slot = (post.order.local_slot_id, hand_off.reservation.slot_id)
        return Write(post.pages, slot, notification.SerializeToString())

    # -- orders, run by the thread ---------------------------------------------------------------------------------------------

    def _open(self, request_id: str, reservation: Reservation) -> list[Action]:
        decode, now = reservation.decode, self._clock.now()
        link = self._links.get(decode.key, "")
        if self._state.is_usable(link):
            return self._state.open(request_id, link, reservation, now)
        lost, waits = link, link in self._sessions
        self._num_links += 1
        link = self._links[decode.key] = f"{decode.name}#{decode.incarnation}/{self._num_links}"
        self._sessions[link] = PeerSession(link, decode, self._speaker, self)
        if waits:
            self._waiting[lost] = link
        else:
            self._loop.call_soon_threadsafe(self._begin_session, self._sessions[link])
        return self._state.open(request_id, link, reservation, now, waits)

    def _heard(self, link: str, message: transfer_pb2.ReceiverMessage) -> list[Action]:
        actions: list[Action] = []
        if message.HasField("pong"):
            self._state.vouched(link, message.pong / 1e6)
        for epoch in message.live:
            self._state.live(link, epoch)
        for epoch in message.released:
            actions += self._state.released(link, epoch, self._clock.now())
        for epoch in message.revoked:
            actions += self._state.revoked(link, epoch)
        return actions

    # -- the sessions, on the event loop -----------------------------------------------------------------------------------------

    def _begin_session(self, session: PeerSession) -> None:
        session.task = asyncio.create_task(session.run())
        self._tasks.add(session.task)
        session.task.add_done_callback(self._tasks.discard)

    def session_connect(self, link: str, hello: transfer_pb2.ReceiverHello) -> concurrent.futures.Future[None]:
        """Have the thread connect the transport."""
        connected: concurrent.futures.Future[None] = concurrent.futures.Future()

        def connect() -> None:
            if not connected.set_running_or_notify_cancel():
                return  # the session has ended meanwhile
            self._fence()
            try:
                if not self._state.is_usable(link):
                    raise MemberLost(f"{link} was given up")
                lanes = self._own.transport.connect(link, hello.agent, decode_region(hello.pages), decode_region(hello.slots))
                self._report.made(link, hello.hello.name, lanes, hello.machine, hello.pages.memory)
            except BatonError as error:
                connected.set_exception(error)
            else:
                connected.set_result(None)

        self._thread.put(connect)
        return connected

    def session_heard(self, link: str, message: transfer_pb2.ReceiverMessage) -> None:
        self._order(lambda: self._heard(link, message))

    def session_ended(self, link: str, error: BatonError) -> None:
        self._order(lambda: self._state.peer_lost(link, error))

    # -- what receivers ask -------------------------------------------------------------------------------------------------------

    async def End(self, request: transfer_pb2.EndRequest, context: grpc.aio.ServicerContext) -> transfer_pb2.EndReply:
        mine = self._member.incarnation
        if request.incarnation != mine:
            return transfer_pb2.EndReply(incarnation=mine)
        answer = asyncio.wrap_future(self.end(request.link))
        try:
            await asyncio.wait((answer, self._ended), return_when=asyncio.FIRST_COMPLETED)  # a thread that has ended does not answer
            return transfer_pb2.EndReply(incarnation=mine, is_over=answer.result() if answer.done() else True)
        finally:
            answer.cancel()

    def end(self, link: str) -> concurrent.futures.Future[bool]:
        """The receiver knows this session no more. True: no write of it is under way, and none will follow. Never done if
        `close` was called before: all sessions are over when that returns."""
        ended: concurrent.futures.Future[bool] = concurrent.futures.Future()

        def end() -> None:
            self._fence()
            self._perform(self._state.peer_lost(link, MemberLost("the receiver ended the session")))
            if ended.set_running_or_notify_cancel():
                ended.set_result(self._state.is_over(link))

        self._thread.put(end)
        return ended

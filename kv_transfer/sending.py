"""KVSender: the edge around `sender.Sender`: one thread that owns the transport, and one session a peer on the worker's event loop.

The worker's calls return at once; what happens comes back as `HandedOff` and `Closed` events, called from this thread.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import grpc.aio

from core.clock import Clock
from core.codec import decode_error
from core.errors import BatonError, MemberLost, Mismatch, TransferFailed
from core.kv_layout import WIRE_VERSION, KVLayout
from core.log import get_logger
from core.request import Member, Reservation
from core.rpc import PING_INTERVAL_S, new_channel
from kv_transfer.checksum import checksum
from kv_transfer.config import TransferConfig
from kv_transfer.sender import Action, Closed, CommitOrder, HandedOff, LastWriteOut, Post, Renew, Sender
from kv_transfer.transport import Region, Write
from kv_transfer.transports import new_transport
from protos import common_pb2, transfer_pb2, transfer_pb2_grpc

log = get_logger("sender")

TICK_S = 0.25


@dataclass(slots=True)
class _Peer:
    """A decode rank, one life of it. `outgoing` is drained by its session coroutine; None ends it."""

    key: str
    member: Member
    outgoing: asyncio.Queue[transfer_pb2.SenderMessage | None] = field(default_factory=asyncio.Queue)
    is_connected: bool = False
    waiting: list[Post] = field(default_factory=list)


class KVSender:
    def __init__(
        self,
        config: TransferConfig,
        layout: KVLayout,
        pages: Region,
        slots: Region,
        member: Member,
        clock: Clock,
        on_event: Callable[[HandedOff | Closed], None],
    ) -> None:
        self._config, self._layout, self._member, self._clock, self._on_event = config, layout, member, clock, on_event
        self._pages, self._slots = pages, slots
        self._state = Sender(
            page_bytes=pages.piece_bytes,
            slot_bytes=slots.piece_bytes,
            max_bytes_in_flight=config.max_bytes_in_flight,
            deadline_s=config.deadline_s,
        )
        self._inbox: queue.SimpleQueue[Callable[[], list[Action]] | None] = queue.SimpleQueue()
        self._peers: dict[str, _Peer] = {}
        self._writes: dict[int, str] = {}
        self._sessions: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self._run, name="kv-sender", daemon=True)
        self._started = threading.Event()
        self._agent = b""

    # -- for the worker --------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """To be called on the worker's event loop, where the sessions will run."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()
        await asyncio.to_thread(self._started.wait)

    async def close(self) -> None:
        """End all sessions and the thread. Hand-offs under way are lost to their receivers."""
        self._inbox.put(None)
        await asyncio.to_thread(self._thread.join)
        for peer in self._peers.values():
            peer.outgoing.put_nowait(None)
        for session in list(self._sessions):
            session.cancel()
        await asyncio.gather(*self._sessions, return_exceptions=True)

    @property
    def num_open(self) -> int:
        return self._state.num_open

    def open(self, request_id: str, reservation: Reservation) -> None:
        key = f"{reservation.decode.name}#{reservation.decode.incarnation}"

        def opened() -> list[Action]:
            if key not in self._peers:
                peer = self._peers[key] = _Peer(key, reservation.decode)
                self._loop.call_soon_threadsafe(self._begin_session, peer)
            return self._state.open(request_id, key, reservation, self._clock.now())

        self._inbox.put(opened)

    def push_pages(self, request_id: str, first_page: int, local_page_ids: list[int]) -> None:
        self._inbox.put(lambda: self._state.push(request_id, first_page, local_page_ids, self._clock.now()))

    def commit(self, request_id: str, order: CommitOrder) -> None:
        """All pages of the sequence, the last partial one included, have been pushed."""
        self._inbox.put(lambda: self._state.commit(request_id, order, self._clock.now()))

    def abort(self, request_id: str) -> None:
        self._inbox.put(lambda: self._state.abort(request_id, self._clock.now()))

    # -- the thread ------------------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        name = f"{self._member.name}#{self._member.incarnation}"
        self._transport = new_transport(self._config, name)
        self._agent = self._transport.register(self._pages, self._slots)
        self._started.set()
        next_tick = self._clock.now() + TICK_S
        while self._take_orders():
            if self._state.needs_progress:
                self._poll()
            if self._clock.now() >= next_tick:
                next_tick = self._clock.now() + TICK_S
                self._perform(self._state.tick(self._clock.now()))
        self._transport.close()

    def _take_orders(self) -> bool:
        """Run what came in, waiting for it as long as the transport need not be polled; False when told to stop."""
        try:
            wait_s = self._config.poll_interval_ms / 1000 if self._state.needs_progress else TICK_S
            order = self._inbox.get(timeout=wait_s)
            while order is not None:
                self._perform(order())
                order = self._inbox.get_nowait()
            return False
        except queue.Empty:
            return True

    def _poll(self) -> None:
        for write_id, succeeded in self._transport.poll().finished:
            request_id = self._writes.pop(write_id, None)
            if request_id is not None:
                self._perform(self._state.write_finished(request_id, write_id, succeeded, self._clock.now()))

    def _perform(self, actions: list[Action]) -> None:
        """Carry the actions out, those that follow from them too, one after the other."""
        todo = deque(actions)
        while todo:
            action = todo.popleft()
            if isinstance(action, Post):
                todo += self._post(action)
            elif isinstance(action, Renew):
                self._tell(action.peer, transfer_pb2.SenderMessage(renew=action.epochs))
            elif isinstance(action, LastWriteOut):
                self._tell(action.peer, transfer_pb2.SenderMessage(last_write_out=[action.epoch]))
            else:
                self._on_event(action)

    def _tell(self, key: str, message: transfer_pb2.SenderMessage) -> None:
        peer = self._peers.get(key)
        if peer is not None:
            self._loop.call_soon_threadsafe(peer.outgoing.put_nowait, message)

    def _post(self, post: Post) -> list[Action]:
        """Start a write; returns what follows if it cannot be started."""
        peer = self._peers[post.peer]
        order = post.order
        slot, notification = None, b""
        if order is not None:
            hand_off = self._state.hand_off(post.request_id)
            assert hand_off is not None
            slot = (order.local_slot_id, hand_off.reservation.slot_id)
            sums: list[int] = []
            if self._config.checksum:
                sums = [checksum(self._pages, local) for local, _ in hand_off.all_pages] + [checksum(self._slots, slot[0])]
            notification = transfer_pb2.Commit(
                epoch=hand_off.reservation.epoch,
                decode_incarnation=peer.member.incarnation,
                sender_incarnation=self._member.incarnation,
                request_id=post.request_id,
                num_tokens=order.num_tokens,
                num_pages=len(hand_off.all_pages),
                first_token=order.first_token,
                checksums=sums,
            ).SerializeToString()
        try:
            write_id = self._transport.write(post.peer, Write(post.pages, slot, notification))
        except BatonError as error:
            return self._state.write_refused(post.request_id, error, self._clock.now())
        num_bytes = len(post.pages) * self._pages.piece_bytes + (self._slots.piece_bytes if slot else 0)
        self._writes[write_id] = post.request_id
        self._state.posted(post.request_id, write_id, num_bytes)
        return []

    def _lost(self, peer: _Peer, reason: str) -> list[Action]:
        if self._peers.get(peer.key) is not peer:
            return []
        self._transport.disconnect(peer.key)
        for write_id, _ in self._transport.poll().finished:
            self._writes.pop(write_id, None)
        del self._peers[peer.key]
        log.warning("transfer.peer_lost", peer=peer.key, reason=reason)
        return self._state.peer_lost(peer.key, reason, self._clock.now())

    # -- the sessions ----------------------------------------------------------------------------------------------------------

    def _begin_session(self, peer: _Peer) -> None:
        task = asyncio.create_task(self._session(peer))
        self._sessions.add(task)
        task.add_done_callback(self._sessions.discard)

    async def _session(self, peer: _Peer) -> None:
        """Hello, then messages both ways until either side ends. Whatever ends it, the hand-offs there are told."""
        channel = new_channel(peer.member.address)
        reason = "closed"
        try:
            call = transfer_pb2_grpc.TransferStub(channel).Session()
            await asyncio.wait_for(self._greet(peer, call), self._config.liveness_timeout_s)
            writer = asyncio.create_task(self._write_messages(peer, call))
            try:
                while True:
                    message = await asyncio.wait_for(call.read(), self._config.liveness_timeout_s)
                    if message is grpc.aio.EOF:
                        break
                    if message.HasField("refused"):
                        raise decode_error(message.refused)
                    self._inbox.put(lambda message=message: self._heard(peer, message))  # type: ignore[misc]
            finally:
                writer.cancel()
        except TimeoutError:
            reason = f"nothing heard for {self._config.liveness_timeout_s:g} s"
        except grpc.aio.AioRpcError as error:
            reason = f"{error.code().name}: {error.details()}"
        except BatonError as error:
            reason = str(error)
        finally:
            self._inbox.put(lambda: self._lost(peer, reason))
            await channel.close()

    async def _greet(self, peer: _Peer, call: Any) -> None:
        hello = common_pb2.Hello(wire_version=WIRE_VERSION, name=self._member.name, incarnation=self._member.incarnation)
        layout = self._layout.to_json()
        await call.write(
            transfer_pb2.SenderMessage(
                hello=transfer_pb2.SenderHello(hello=hello, kv_layout=layout, transport=self._config.transport, agent=self._agent)
            )
        )
        answer = await call.read()
        if answer is grpc.aio.EOF:
            raise MemberLost(f"{peer.key} closed the session")
        if answer.HasField("refused"):
            raise decode_error(answer.refused)
        theirs = answer.hello
        if theirs.hello.incarnation != peer.member.incarnation:
            raise MemberLost(f"{peer.member.address} is now another incarnation of {peer.member.name}")
        if theirs.kv_layout != layout:
            raise Mismatch(f"KV layouts differ: {self._layout.differences(KVLayout.from_json(theirs.kv_layout))}")
        connected: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def connect() -> list[Action]:
            error: BatonError | None = None
            try:
                self._transport.connect(peer.key, theirs.agent, _region(theirs.pages), _region(theirs.slots))
            except TransferFailed as failure:
                error = failure
            self._loop.call_soon_threadsafe(_resolve, connected, error)
            return []

        self._inbox.put(connect)
        await connected

    async def _write_messages(self, peer: _Peer, call: Any) -> None:
        while True:
            try:
                message = await asyncio.wait_for(peer.outgoing.get(), PING_INTERVAL_S)
            except TimeoutError:
                message = transfer_pb2.SenderMessage(ping=1)
            if message is None:
                await call.done_writing()
                return
            await call.write(message)

    def _heard(self, peer: _Peer, message: transfer_pb2.ReceiverMessage) -> list[Action]:
        now, actions = self._clock.now(), list[Action]()
        for epoch in message.live:
            actions += self._state.live(peer.key, epoch, now)
        for epoch in message.released:
            actions += self._state.released(peer.key, epoch)
        for epoch in message.revoked:
            actions += self._state.revoked(peer.key, epoch, now)
        return actions


def _region(wire: transfer_pb2.Region) -> Region:
    return Region(
        address=wire.address,
        num_pieces=wire.num_pieces,
        piece_bytes=wire.piece_bytes,
        device_id=wire.device_id,
        memory=wire.memory,
    )


def _resolve(future: asyncio.Future[None], error: BatonError | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)

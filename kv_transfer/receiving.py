"""KVReceiver: the edge around `receiver.Receiver`: one thread that owns the transport, and the servicer of the senders' sessions.

Events (`Committed`, `Quiesced`, `SenderLost`, ...) are called from this thread.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Callable

import grpc.aio

from core.clock import Clock
from core.codec import encode_error
from core.errors import BatonError, Mismatch, Unavailable
from core.kv_layout import WIRE_VERSION, KVLayout
from core.log import get_logger
from core.request import Member
from core.session import Outbox, serve_session
from kv_transfer.checksum import checksum
from kv_transfer.config import TransferConfig
from kv_transfer.receiver import (
    Action,
    Arrived,
    Committed,
    Ignored,
    Live,
    Quiesced,
    Receiver,
    Release,
    Renewed,
    Revoke,
    SenderLost,
)
from kv_transfer.transport import Region
from kv_transfer.transports import new_transport
from protos import common_pb2, transfer_pb2, transfer_pb2_grpc

log = get_logger("receiver")

TICK_S = 0.25

Event = Committed | Quiesced | SenderLost | Renewed


class KVReceiver(transfer_pb2_grpc.TransferServicer):
    def __init__(
        self,
        config: TransferConfig,
        layout: KVLayout,
        pages: Region,
        slots: Region,
        member: Member,
        clock: Clock,
        on_event: Callable[[Event], None],
    ) -> None:
        self._config, self._layout, self._member, self._clock, self._on_event = config, layout, member, clock, on_event
        self._pages, self._slots = pages, slots
        self._state = Receiver(incarnation=member.incarnation, quarantine_s=config.quarantine_s)
        self._places: dict[int, tuple[tuple[int, ...], int]] = {}
        """Epoch -> page ids and slot id, for checked mode."""
        self._inbox: queue.SimpleQueue[Callable[[], list[Action]] | None] = queue.SimpleQueue()
        self._outboxes: dict[str, Outbox] = {}
        self._thread = threading.Thread(target=self._run, name="kv-receiver", daemon=True)
        self._started = threading.Event()
        self._agent = b""

    # -- for the worker --------------------------------------------------------------------------------------------------------

    def add_to(self, server: grpc.aio.Server) -> None:
        transfer_pb2_grpc.add_TransferServicer_to_server(self, server)

    async def start(self) -> None:
        self._thread.start()
        await asyncio.to_thread(self._started.wait)

    async def close(self) -> None:
        self._inbox.put(None)
        for outbox in self._outboxes.values():
            outbox.close()
        await asyncio.to_thread(self._thread.join)

    def expect(self, epoch: int, request_id: str, page_ids: tuple[int, ...], slot_id: int, num_tokens: int) -> None:
        """Let a sender open this epoch."""

        def expected() -> list[Action]:
            self._places[epoch] = (page_ids, slot_id)
            self._state.expect(epoch, request_id, len(page_ids), num_tokens)
            return []

        self._inbox.put(expected)

    def release(self, epoch: int) -> None:
        """The sequence took its first step: its sender may free its pages."""
        self._inbox.put(lambda: self._state.release(epoch))

    def revoke(self, epoch: int) -> None:
        """Have the sender stop. Quiesced follows when nothing of it can land any more."""
        self._inbox.put(lambda: self._state.revoke(epoch, self._clock.now()))

    # -- the thread ------------------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        self._transport = new_transport(self._config, f"{self._member.name}#{self._member.incarnation}")
        self._agent = self._transport.register(self._pages, self._slots)
        self._started.set()
        next_tick = self._clock.now() + TICK_S
        while True:
            busy = self._state.num_open > 0
            try:
                order = self._inbox.get(timeout=self._config.poll_interval_ms / 1000 if busy else TICK_S)
                if order is None:
                    break
                self._perform(order())
            except queue.Empty:
                pass
            if busy:
                for note in self._transport.poll().notifications:
                    self._perform(self._commit(note))
            if self._clock.now() >= next_tick:
                next_tick = self._clock.now() + TICK_S
                self._perform(self._state.tick(self._clock.now()))
        self._transport.close()

    def _commit(self, note: bytes) -> list[Action]:
        wire = transfer_pb2.Commit.FromString(note)
        sender = next((key for key in list(self._outboxes) if key.endswith(f"#{wire.sender_incarnation}")), "")
        arrived = Arrived(
            epoch=wire.epoch,
            receiver_incarnation=wire.decode_incarnation,
            sender=sender,
            request_id=wire.request_id,
            num_tokens=wire.num_tokens,
            num_pages=wire.num_pages,
            first_token=wire.first_token,
            checksums=tuple(wire.checksums),
        )
        if wire.checksums and wire.epoch in self._places:
            pages, slot = self._places[wire.epoch]
            found = [checksum(self._pages, page) for page in pages] + [checksum(self._slots, slot)]
            if found != list(wire.checksums):
                wrong = [place for place, (a, b) in enumerate(zip(found, wire.checksums, strict=False)) if a != b]
                log.error("transfer.checksum_failed", request_id=wire.request_id, epoch=wire.epoch, pieces=wrong[:8])
                return self._state.revoke(wire.epoch, self._clock.now())
        return self._state.commit(arrived)

    def _perform(self, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, (Live, Revoke, Release)):
                outbox = self._outboxes.get(action.sender)
                if outbox is not None:
                    message = transfer_pb2.ReceiverMessage()
                    getattr(message, {Live: "live", Revoke: "revoked", Release: "released"}[type(action)]).append(action.epoch)
                    outbox.post(message)
            elif isinstance(action, Ignored):
                log.warning("transfer.commit_ignored", epoch=action.epoch, reason=action.reason)
            else:
                if isinstance(action, Quiesced):
                    self._places.pop(action.epoch, None)
                self._on_event(action)

    # -- the sessions ----------------------------------------------------------------------------------------------------------

    async def Session(
        self, requests: AsyncIterator[transfer_pb2.SenderMessage], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[transfer_pb2.ReceiverMessage]:
        first = await anext(requests, None)
        try:
            sender = self._check_hello(first)
        except BatonError as error:
            log.warning("transfer.refused", reason=str(error))
            yield transfer_pb2.ReceiverMessage(refused=encode_error(error))
            return
        outbox = Outbox(transfer_pb2.ReceiverMessage, asyncio.get_running_loop())
        self._outboxes[sender] = outbox
        hello = common_pb2.Hello(wire_version=WIRE_VERSION, name=self._member.name, incarnation=self._member.incarnation)
        yield transfer_pb2.ReceiverMessage(
            hello=transfer_pb2.ReceiverHello(
                hello=hello,
                kv_layout=self._layout.to_json(),
                agent=self._agent,
                pages=_wire(self._pages),
                slots=_wire(self._slots),
            )
        )

        def handle(message: transfer_pb2.SenderMessage) -> None:
            self._inbox.put(lambda: self._heard(sender, message))

        def finish(update: transfer_pb2.ReceiverMessage) -> None:
            update.pong = 1

        try:
            async for update in serve_session(requests, outbox, handle, finish, self._config.liveness_timeout_s):
                yield update
        except Unavailable as error:
            log.warning("transfer.sender_lost", sender=sender, reason=str(error))
        finally:
            if self._outboxes.get(sender) is outbox:
                del self._outboxes[sender]
            self._inbox.put(lambda: self._lost(sender))

    def _check_hello(self, message: transfer_pb2.SenderMessage | None) -> str:
        """Returns the sender's key. Raises Mismatch naming what differs."""
        if message is None or not message.HasField("hello"):
            raise Mismatch("a transfer session begins with hello")
        hello = message.hello
        if hello.hello.wire_version != WIRE_VERSION:
            raise Mismatch(f"wire version {hello.hello.wire_version} there, {WIRE_VERSION} here")
        if hello.transport != self._config.transport:
            raise Mismatch(f"transport {hello.transport!r} there, {self._config.transport!r} here")
        if hello.kv_layout != self._layout.to_json():
            raise Mismatch(f"KV layouts differ: {self._layout.differences(KVLayout.from_json(hello.kv_layout))}")
        return f"{hello.hello.name}#{hello.hello.incarnation}"

    def _heard(self, sender: str, message: transfer_pb2.SenderMessage) -> list[Action]:
        actions: list[Action] = []
        for epoch in message.renew:
            actions += self._state.renew(sender, epoch)
        for epoch in message.last_write_out:
            actions += self._state.last_write_out(sender, epoch)
        return actions

    def _lost(self, sender: str) -> list[Action]:
        self._transport.disconnect(sender)
        return self._state.sender_lost(sender, self._clock.now())


def _wire(region: Region) -> transfer_pb2.Region:
    return transfer_pb2.Region(
        address=region.address,
        num_pieces=region.num_pieces,
        piece_bytes=region.piece_bytes,
        device_id=region.device_id,
        memory=region.memory,
    )

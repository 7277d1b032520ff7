"""The sender's end of a transfer session: hello, then messages both ways, until either side ends. Runs on the worker's event loop."""

from __future__ import annotations

import asyncio
import concurrent.futures
from dataclasses import dataclass
from typing import Any, Protocol

import grpc.aio

from core.clock import Clock
from core.codec import decode_error
from core.errors import BatonError, MemberLost, Mismatch
from core.kv_layout import WIRE_VERSION, KVLayout
from core.request import Member
from core.rpc import PING_INTERVAL_S, new_channel
from protos import common_pb2, transfer_pb2, transfer_pb2_grpc


class SessionOwner(Protocol):
    """Who is told what happens in a session, and connects the transport for it."""

    def session_connect(self, link: str, hello: transfer_pb2.ReceiverHello) -> concurrent.futures.Future[None]: ...

    def session_heard(self, link: str, message: transfer_pb2.ReceiverMessage) -> None: ...

    def session_ended(self, link: str, error: BatonError) -> None:
        """Called once, whatever ended the session."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Speaker:
    """Who speaks for this end, in all its sessions."""

    member: Member
    layout: KVLayout
    transport: str
    liveness_timeout_s: float
    clock: Clock


class PeerSession:
    """One session with one life of a decode rank. `outgoing` takes messages on the event loop."""

    def __init__(self, link: str, peer: Member, speaker: Speaker, owner: SessionOwner) -> None:
        self._link, self._peer, self._speaker, self._owner = link, peer, speaker, owner
        self.outgoing: asyncio.Queue[transfer_pb2.SenderMessage] = asyncio.Queue()
        self.task: asyncio.Task[None] | None = None

    def stop(self) -> None:
        if self.task is not None:
            self.task.cancel()

    async def run(self) -> None:
        timeout_s = self._speaker.liveness_timeout_s
        error: BatonError = MemberLost(f"{self._peer.name} ended the session")
        channel = new_channel(self._peer.address)
        writer: asyncio.Task[None] | None = None
        try:
            call = transfer_pb2_grpc.TransferStub(channel).Session()
            async with asyncio.timeout(timeout_s):  # wait_for of Python 3.11 may swallow a cancellation
                await self._greet(call)
            writer = asyncio.create_task(self._write(call))
            while (message := await self._read(call)) is not grpc.aio.EOF:
                if message.HasField("refused"):
                    raise decode_error(message.refused)
                self._owner.session_heard(self._link, message)
        except TimeoutError:
            error = MemberLost(f"{self._peer.name} is lost: nothing heard for {timeout_s:g} s")
        except grpc.aio.AioRpcError as failure:
            error = MemberLost(f"{self._peer.name} is lost: {failure.code().name}: {failure.details()}")
        except BatonError as refusal:
            error = refusal
        finally:
            if writer is not None:
                writer.cancel()
            self._owner.session_ended(self._link, error)
            await channel.close()

    async def _greet(self, call: Any) -> None:
        """Raises Mismatch if the two do not fit, MemberLost if this is not the peer that was meant."""
        speaker, peer = self._speaker, self._peer
        sent_at = speaker.clock.now()
        hello = common_pb2.Hello(wire_version=WIRE_VERSION, name=speaker.member.name, incarnation=speaker.member.incarnation)
        layout = speaker.layout.to_json()
        ours = transfer_pb2.SenderHello(
            hello=hello,
            kv_layout=layout,
            transport=speaker.transport,
            address=speaker.member.address,
            link=self._link,
        )
        await call.write(transfer_pb2.SenderMessage(hello=ours))
        answer = await call.read()
        if answer is grpc.aio.EOF:
            raise MemberLost(f"{peer.name} closed the session")
        if answer.HasField("refused"):
            raise decode_error(answer.refused)
        theirs = answer.hello
        if theirs.hello.incarnation != peer.incarnation:
            raise MemberLost(f"{peer.address} is now another incarnation of {peer.name}")
        check_peer(speaker.layout, theirs.hello, theirs.kv_layout)
        for region, piece_bytes in ((theirs.pages, speaker.layout.page_bytes), (theirs.slots, speaker.layout.slot_bytes)):
            if region.piece_bytes != piece_bytes:
                raise Mismatch(f"{peer.name} has pieces of {region.piece_bytes} bytes where its layout says {piece_bytes}")
        await asyncio.wrap_future(self._owner.session_connect(self._link, theirs))
        self._owner.session_heard(self._link, transfer_pb2.ReceiverMessage(pong=round(sent_at * 1e6)))

    async def _read(self, call: Any) -> Any:
        async with asyncio.timeout(self._speaker.liveness_timeout_s):
            return await call.read()

    async def _write(self, call: Any) -> None:
        """Ends quietly when the call does; the reader says why."""
        while not call.done():
            try:
                async with asyncio.timeout(PING_INTERVAL_S):
                    message = await self.outgoing.get()
            except TimeoutError:
                message = transfer_pb2.SenderMessage()
            message.ping = round(self._speaker.clock.now() * 1e6)
            try:
                await call.write(message)
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
                return


def check_peer(layout: KVLayout, hello: common_pb2.Hello, kv_layout: str) -> None:
    """Raises Mismatch, naming what differs, unless the peer that said this has the same wire version and layout."""
    if hello.wire_version != WIRE_VERSION:
        raise Mismatch(f"wire version {hello.wire_version} of {hello.name}, {WIRE_VERSION} here")
    if kv_layout == layout.to_json():
        return
    try:
        difference = layout.differences(KVLayout.from_json(kv_layout))
    except (ValueError, TypeError, KeyError) as error:
        raise Mismatch(f"the KV layout of {hello.name} cannot be read: {error!r}") from error
    raise Mismatch(f"KV layouts differ between here and {hello.name} (there): {difference}")

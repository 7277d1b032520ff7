"""Sender and receiver over real sessions on loopback, with copies in this process for a transport."""

from __future__ import annotations

import asyncio
import concurrent.futures
import ctypes
import dataclasses
import queue
import threading
from collections.abc import Awaitable, Callable
from typing import Any, cast

import pytest

import kv_transfer.session
from core.clock import SystemClock
from core.errors import MemberLost, Mismatch
from core.kv_layout import Field, KVLayout
from core.metrics import new_registry
from core.region import Region
from core.request import Member, Reservation
from core.rpc import new_server
from kv_transfer.config import TransferConfig
from kv_transfer.metrics import ReceiverMetrics, SenderMetrics
from kv_transfer.receiver import Committed, Quiesced, Renewed, SenderLost
from kv_transfer.receiving import KVReceiver
from kv_transfer.sender import Closed, CommitOrder, HandedOff
from kv_transfer.sending import KVSender
from kv_transfer.transports.memory import Fate
from tests.support.patience import overload

PAGE, SLOT, COUNT = 256, 64, 8
CONFIG = TransferConfig(transport="memory", checksum=True)


def layout(page_bytes: int = PAGE, kv_format: str = "fp8") -> KVLayout:
    return KVLayout(
        model="m",
        kv_format=kv_format,
        index_format="fp8",
        page_bytes=page_bytes,
        slot_bytes=SLOT,
        page_fields=(Field(name="x.0", offset=0, num_bytes=page_bytes, rows=1, row_bytes=page_bytes),),
        slot_fields=(Field(name="x.0", offset=0, num_bytes=SLOT, rows=1, row_bytes=SLOT),),
    )


class Memory:
    def __init__(self, fill: int, page_bytes: int = PAGE) -> None:
        self._pages = (ctypes.c_uint8 * (page_bytes * COUNT))(*([fill] * page_bytes * COUNT))
        self._slots = (ctypes.c_uint8 * (SLOT * COUNT))(*([fill] * SLOT * COUNT))
        self.pages = Region(address=ctypes.addressof(self._pages), num_pieces=COUNT, piece_bytes=page_bytes)
        self.slots = Region(address=ctypes.addressof(self._slots), num_pieces=COUNT, piece_bytes=SLOT)

    def page(self, number: int) -> set[int]:
        size = self.pages.piece_bytes
        return set(self._pages[number * size : (number + 1) * size])


class Ends:
    """A sender and a receiver, and what they told their workers."""

    def __init__(self, ours: KVLayout, theirs: KVLayout, config: TransferConfig) -> None:
        self.sent: queue.SimpleQueue[HandedOff | Closed] = queue.SimpleQueue()
        self.received: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.memory = Memory(7, ours.page_bytes), Memory(0, theirs.page_bytes)
        self._layouts, self._config = (ours, theirs), config

    async def __aenter__(self) -> Ends:
        self._server = new_server()
        port = self._server.add_insecure_port("127.0.0.1:0")
        self.decode = Member(role="decode", replica=0, rank=0, address=f"127.0.0.1:{port}", incarnation=77)
        self.prefill = Member(role="prefill", replica=0, rank=0, address=f"127.0.0.1:{port}", incarnation=5)
        clock, died = SystemClock(), cast(Any, pytest.fail)
        mine, theirs = self.memory
        sender_metrics, receiver_metrics = SenderMetrics(new_registry()), ReceiverMetrics(new_registry())
        self.sender = KVSender(
            self._config, self._layouts[0], mine.pages, mine.slots, self.prefill, clock, sender_metrics, self.sent.put, died
        )
        self.receiver = KVReceiver(
            self._config, self._layouts[1], theirs.pages, theirs.slots, self.decode, clock, receiver_metrics, self.received.put, died
        )
        await self.sender.start()
        await self.receiver.start()
        self.receiver.add_to(self._server)
        self.sender.add_to(self._server)
        await self._server.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.sender.close()
        await self.receiver.close()
        await self._server.stop(grace=None)

    def grant(self, epoch: int = 1, incarnation: int = 77) -> Reservation:
        decode = dataclasses.replace(self.decode, incarnation=incarnation)
        return Reservation(request_id=f"r{epoch}", decode=decode, epoch=epoch, page_ids=(5, 2), slot_id=3, lease_s=15.0)

    async def next(self, events: queue.SimpleQueue[Any]) -> Any:
        async with asyncio.timeout(10):
            while events.empty():
                await asyncio.sleep(0.005)
        return events.get()


def run(
    test: Callable[[Ends], Awaitable[None]], ours: KVLayout | None = None, theirs: KVLayout | None = None, config: TransferConfig = CONFIG
) -> None:
    async def within() -> None:
        async with Ends(ours or layout(), theirs or layout(), config) as ends:
            await test(ends)

    asyncio.run(within())


def test_pages_arrive_where_they_were_granted_and_each_side_hears_of_it() -> None:
    async def test(ends: Ends) -> None:
        ends.receiver.expect(1, "r1", (5, 2), 3, 300)
        ends.sender.open("r1", ends.grant())
        ends.sender.push_pages("r1", 0, [1])
        ends.sender.push_pages("r1", 1, [4])
        ends.sender.commit("r1", CommitOrder(local_slot_id=0, num_tokens=300, first_token=9))
        assert isinstance(await ends.next(ends.received), Renewed)
        assert await ends.next(ends.received) == Committed(1, 9)
        handed_off = await ends.next(ends.sent)
        assert isinstance(handed_off, HandedOff) and handed_off.num_bytes == 2 * PAGE + SLOT
        assert [ends.memory[1].page(number) for number in (5, 2, 1)] == [{7}, {7}, {0}]
        ends.receiver.release(1)
        assert await ends.next(ends.sent) == Closed("r1", None)

    run(test)


def test_a_write_is_seen_out_without_a_wait_for_the_poll_interval() -> None:
    async def test(ends: Ends) -> None:
        cast(Any, ends.sender)._own.transport.fate = lambda write: Fate(delay_polls=8)
        ends.receiver.expect(1, "r1", (5, 2), 3, 300)
        ends.sender.open("r1", ends.grant())
        ends.sender.push_pages("r1", 0, [1, 4])
        assert isinstance(await ends.next(ends.received), Renewed)
        ends.sender.commit("r1", CommitOrder(local_slot_id=0, num_tokens=300, first_token=9))
        handed_off = await ends.next(ends.sent)
        assert isinstance(handed_off, HandedOff)
        assert handed_off.seconds < 1.0 * overload(), "two writes, nine polls each: as many wake-ups by the session's pings take seconds"

    run(test, config=dataclasses.replace(CONFIG, poll_interval_ms=1e6))


async def _refused(ends: Ends, *says: str) -> None:
    ends.receiver.expect(1, "r1", (5, 2), 3, 300)
    ends.sender.open("r1", ends.grant())
    closed = await ends.next(ends.sent)
    assert isinstance(closed, Closed) and isinstance(closed.error, Mismatch)
    assert all(part in str(closed.error) for part in says), str(closed.error)
    ends.receiver.revoke(1)
    assert await ends.next(ends.received) == Quiesced(1), "nobody was let in"


@pytest.mark.parametrize(
    ("theirs", "says"), [(layout(512), ("page_bytes", "256", "512")), (layout(kv_format="bf16"), ("kv_format", "fp8", "bf16"))]
)
def test_another_layout_is_refused_with_what_differs(theirs: KVLayout, says: tuple[str, ...]) -> None:
    run(lambda ends: _refused(ends, *says), theirs=theirs)


def test_another_wire_version_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(ends: Ends) -> None:
        true_version = kv_transfer.session.WIRE_VERSION
        monkeypatch.setattr(kv_transfer.session, "WIRE_VERSION", true_version + 1)
        await _refused(ends, f"wire version {true_version} of decode/0.0", f"{true_version + 1} here")

    run(test)


def test_another_transport_is_refused_by_name() -> None:
    async def test(ends: Ends) -> None:
        ends.sender._speaker = dataclasses.replace(ends.sender._speaker, transport="nixl")
        await _refused(ends, "'nixl'", "'memory'")

    run(test)


def test_another_life_at_the_same_address_is_not_taken_for_the_one_that_granted() -> None:
    async def test(ends: Ends) -> None:
        ends.sender.open("r1", ends.grant(incarnation=76))
        closed = await ends.next(ends.sent)
        assert isinstance(closed.error, MemberLost) and "another incarnation" in str(closed.error)
        ends.receiver.expect(1, "r1", (5, 2), 3, 300)
        ends.sender.open("r1", ends.grant())
        assert isinstance(await ends.next(ends.received), Renewed), "the right one can be reached"
        assert set(ends.sender._links) == {ends.decode.key}, "lives that are over are not remembered"

    run(test)


def test_a_hand_off_waits_while_a_lost_link_to_its_rank_has_a_write_under_way() -> None:
    """For seconds, if that hangs. Where there is no other decode rank, all runs of a request would fail meanwhile."""

    async def test(ends: Ends) -> None:
        transport = cast(Any, ends.sender)._own.transport
        transport.fate = lambda write: Fate(delay_polls=10**9)
        ends.receiver.expect(1, "r1", (5, 2), 3, 300)
        ends.sender.open("r1", ends.grant())
        ends.sender.push_pages("r1", 0, [1, 4])
        assert isinstance(await ends.next(ends.received), Renewed)
        async with asyncio.timeout(10):
            while not transport._pending:
                await asyncio.sleep(0.005)
        (lost,) = ends.sender._sessions
        ends.sender.session_ended(lost, MemberLost("cut"))
        transport.fate = lambda write: Fate()
        ends.receiver.expect(2, "r2", (6, 7), 1, 300)
        ends.sender.open("r2", dataclasses.replace(ends.grant(2), page_ids=(6, 7), slot_id=1))
        ends.sender.push_pages("r2", 0, [1, 4])
        ends.sender.commit("r2", CommitOrder(local_slot_id=0, num_tokens=300, first_token=9))
        async with asyncio.timeout(10):
            while not ends.sender._waiting:
                await asyncio.sleep(0.005)
        assert ends.sent.empty() and len(transport._peers) == 1, "one connection at a time"
        transport._pending[0].fate = Fate()
        closed = await ends.next(ends.sent)
        assert closed.request_id == "r1" and isinstance(closed.error, MemberLost)
        handed_off = await ends.next(ends.sent)
        assert isinstance(handed_off, HandedOff) and handed_off.request_id == "r2"
        assert not ends.sender._waiting and len(ends.sender._sessions) == 1
        events = [await ends.next(ends.received) for _ in range(3)]
        assert Committed(2, 9) in events and any(isinstance(event, SenderLost) for event in events)

    run(test)


def test_a_sender_that_closes_is_missed_at_once() -> None:
    async def test(ends: Ends) -> None:
        ends.receiver.expect(1, "r1", (5, 2), 3, 300)
        ends.sender.open("r1", ends.grant())
        assert isinstance(await ends.next(ends.received), Renewed)
        await ends.sender.close()
        async with asyncio.timeout(4):  # a sender that is silent is missed after five seconds
            assert isinstance(await ends.next(ends.received), SenderLost)

    run(test)


def test_an_abort_on_either_side_frees_both() -> None:
    async def test(ends: Ends) -> None:
        ends.receiver.expect(1, "r1", (5, 2), 3, 300)
        ends.sender.open("r1", ends.grant())
        assert isinstance(await ends.next(ends.received), Renewed)
        ends.receiver.revoke(1)
        closed = await ends.next(ends.sent)
        assert closed.request_id == "r1" and closed.error is not None
        assert await ends.next(ends.received) == Quiesced(1)

    run(test)


QUICK = dataclasses.replace(CONFIG, liveness_timeout_s=2.5, tcp_user_timeout_s=0.3, quarantine_s=4.0)
"""Sessions outlive the time between two pings, and a sender that lives has seconds for its answer."""


@pytest.mark.parametrize("is_told", [True, False])
def test_the_receiver_is_fenced_unless_the_sender_says_that_it_is_over(is_told: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The session breaks in the midst of a hand-off: a sender that lives says so, one that is stopped does not."""

    async def test(ends: Ends) -> None:
        if not is_told:
            monkeypatch.setattr(ends.sender, "end", lambda link: concurrent.futures.Future())
        agent = ends.receiver._own.agent
        ends.receiver.expect(1, "r1", (5, 2), 3, 300)
        ends.sender.open("r1", ends.grant())
        assert isinstance(await ends.next(ends.received), Renewed)
        (session,) = ends.receiver._sessions.values()
        session.outbox.close()
        assert isinstance(await ends.next(ends.received), SenderLost)
        assert await ends.next(ends.received) == Quiesced(1)
        assert (ends.receiver._own.agent == agent) is is_told, "a fence is a reset of the transport"

    run(test, config=QUICK)


def test_a_receiver_learns_who_answers_at_its_senders_address() -> None:
    async def test(ends: Ends) -> None:
        ends.sender.open("r1", ends.grant())
        async with asyncio.timeout(5):
            while not any(session.origin.was_reached for session in ends.receiver._sessions.values()):
                await asyncio.sleep(0.01)

    run(test)


def test_a_session_that_ends_before_the_transport_connects_harms_nobody() -> None:
    """Its sender's thread may have hung for longer than a session waits."""

    async def test(ends: Ends) -> None:
        goes_on = threading.Event()
        ends.sender._thread.put(lambda: cast(None, goes_on.wait(5)))
        connected = ends.sender.session_connect("decode/0.0#77/9", ends.receiver._hello())
        assert connected.cancel()
        goes_on.set()
        ends.receiver.expect(1, "r1", (5, 2), 3, 300)
        ends.sender.open("r1", ends.grant())
        assert isinstance(await ends.next(ends.received), Renewed), "the thread lives"

    run(test)

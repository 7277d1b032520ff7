"""What a router's session sends: everything that waits, as one message."""

from __future__ import annotations

import asyncio
from typing import Any

from core.errors import MemberLost
from core.request import Member, Request, SamplingParams
from core.session import Outbox
from decode_worker.server import DecodeService
from prefill_worker.server import PrefillService
from protos import common_pb2, decode_pb2, prefill_pb2
from router.session import MERGED_BYTES, RankSession

MEMBER = Member(role="decode", replica=0, rank=0, address="127.0.0.1:1", incarnation=7)


class Call:
    """Takes what is written; `gate` holds the writer up."""

    def __init__(self) -> None:
        self.written: list[Any] = []
        self.gate = asyncio.Event()

    async def write(self, command: Any) -> None:
        self.written.append(command)
        await self.gate.wait()


def new_request(name: str, num_tokens: int = 3) -> Request:
    return Request(request_id=name, token_ids=(400,) * num_tokens, prompt_len=num_tokens, sampling=SamplingParams(max_tokens=4))


def test_what_waits_goes_out_as_one_message_of_bounded_size() -> None:
    async def live() -> None:
        session, call = RankSession(MEMBER, "r", 5.0), Call()
        await session.close()  # nobody answers at its address; what it writes is what matters
        session.is_connected = True
        writer = asyncio.create_task(session._write(call))
        session.cancel("first")
        while not call.written:
            await asyncio.sleep(0)
        for number in range(1000):
            session.cancel(str(number))
        session.reserve(new_request("small"))
        session.reserve(new_request("large", num_tokens=MERGED_BYTES))
        session.reserve(new_request("last"))
        call.gate.set()
        while len(call.written) < 3:
            await asyncio.sleep(0)
        writer.cancel()
        first, second, third = call.written
        assert list(first.cancels) == ["first"]
        assert list(second.cancels) == [str(number) for number in range(1000)]
        assert [request.request_id for request in second.reserves] == ["small", "large"]
        assert [request.request_id for request in third.reserves] == ["last"]

    asyncio.run(live())


def test_a_reservation_is_unanswered_until_it_is_granted_or_given_up() -> None:
    async def live() -> None:
        session = RankSession(MEMBER, "r", 5.0)
        await session.close()
        session.is_connected = True
        for name in ("granted", "refused"):
            session.listen(name, 3, lambda event: None)
            session.reserve(new_request(name))
        assert session.unanswered == {"granted": 3, "refused": 3}
        session._dispatch(decode_pb2.DecodeUpdate(reserved=[decode_pb2.Reserved(request_id="granted")]))
        assert session.unanswered == {"refused": 3} and set(session.in_flight) == {"granted", "refused"}
        session.forget("refused")
        assert not session.unanswered

    asyncio.run(live())


def test_a_session_that_trips_over_an_update_is_lost_and_begun_again() -> None:
    async def live() -> None:
        reasons = ["once", "again"]

        async def connect() -> str:
            if reasons.pop() == "again":
                session.is_connected = True
                raise KeyError("an update that cannot be read")
            await asyncio.Event().wait()
            return ""

        session, told = RankSession(MEMBER, "r", 5.0), list[Any]()
        session._connect_once = connect  # type: ignore[method-assign]
        session.listen("a", 1, told.append)
        while not told:
            await asyncio.sleep(0.01)
        assert isinstance(told[0].error, MemberLost) and not session.is_connected
        while reasons:
            await asyncio.sleep(0.01)
        await session.close()

    asyncio.run(live())


def test_writing_to_a_call_that_has_ended_is_no_error_of_its_own() -> None:
    """The reader tells why it ended; an error that nobody asks the writer for would be logged as a bug."""

    class Ended(Call):
        async def write(self, command: Any) -> None:
            raise asyncio.InvalidStateError("RPC already finished.")

    async def live() -> None:
        session = RankSession(MEMBER, "r", 5.0)
        await session.close()
        session.is_connected = True
        session.cancel("first")
        async with asyncio.timeout(5):
            await session._write(Ended())

    asyncio.run(live())


class Loop:
    """In place of a worker's loop: what it was told, in order."""

    def __init__(self) -> None:
        self.told: list[tuple[str, Any]] = []

    def cancel(self, request_ids: frozenset[str], outbox: Any) -> None:
        self.told.append(("cancel", sorted(request_ids)))

    def reserve(self, request: Request, outbox: Any) -> None:
        self.told.append(("reserve", request.request_id))

    def run(self, request: Request, reservation: Any, outbox: Any) -> None:
        self.told.append(("run", request.request_id))

    def hand_on(self, request_id: str, reservation: Any, outbox: Any) -> None:
        self.told.append(("hand_on", request_id))


def wire(*names: str) -> list[common_pb2.Request]:
    return [common_pb2.Request(request_id=name, token_ids=bytes([1, 0, 0, 0])) for name in names]


def test_cancels_count_first_and_what_is_cancelled_in_its_own_message_never_begins() -> None:
    loop: Any = Loop()
    command = decode_pb2.DecodeCommand(reserves=wire("a", "b"), cancels=["old", "b"])
    DecodeService(loop, MEMBER, 5.0).handle(command, outbox=None)  # type: ignore[arg-type]
    assert loop.told == [("cancel", ["b", "old"]), ("reserve", "a")]
    loop.told.clear()
    runs = [prefill_pb2.PrefillRun(request=request) for request in wire("a", "b")]
    hand_ons = [prefill_pb2.HandOn(request_id="c"), prefill_pb2.HandOn(request_id="d")]
    command = prefill_pb2.PrefillCommand(runs=runs, cancels=["a", "c"], hand_ons=hand_ons)
    PrefillService(loop, MEMBER, 5.0).handle(command, outbox=None)  # type: ignore[arg-type]
    assert loop.told == [("cancel", ["a", "c"]), ("run", "b"), ("hand_on", "d")]


def test_a_request_that_cannot_be_read_ends_itself_and_not_the_session() -> None:
    async def live() -> None:
        loop: Any = Loop()
        outbox = Outbox(decode_pb2.DecodeUpdate, asyncio.get_running_loop())
        bad, worse, good = wire("bad", "worse", "good")
        bad.sampling.bias_ids.extend([1, 2])
        worse.token_ids = bytes(5)
        DecodeService(loop, MEMBER, 5.0).handle(decode_pb2.DecodeCommand(reserves=[bad, worse, good]), outbox)
        assert loop.told == [("reserve", "good")]
        failures = (await outbox.next(1.0)).failures
        assert {failure.request_id: failure.error.code for failure in failures} == dict.fromkeys(("bad", "worse"), "InvalidRequest")

    asyncio.run(live())

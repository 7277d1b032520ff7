"""One request over ranks that are scripted in memory: order of events, retries, cancellation."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import aclosing
from typing import Any, cast

import pytest

import router.reserving
from core.clock import SystemClock
from core.errors import BatonError, InternalError, MemberLost, NoMembers, Overloaded, Preempted, TransferFailed
from core.kv_layout import PAGE_TOKENS
from core.request import FinishReason, Load, Member, Request, Reservation, SamplingParams, Tokens
from router.config import RouterConfig
from router.members import Members
from router.relay import Journey, Relay
from router.session import Decoded, Event, Failed, FirstToken, HandedOff, HandOffFailed, Reserved

PROMPT = (5, 6, 7)
MAX_TOKENS = 6


def token_at(position: int) -> int:
    return 100 + position


class FakeRank:
    """A session whose rank answers at once. `lose_after`: the decode rank is lost after so many tokens, once."""

    def __init__(self, role: str, replica: int = 0, lose_after: int = 10**6) -> None:
        self.member = Member(role=role, replica=replica, rank=0, address="a:1", incarnation=replica + 1, fingerprint="f")
        self.load = Load(pages_free=9, pages_total=9, slots_free=9, slots_total=9)
        self.in_flight: dict[str, int] = {}
        self.listeners: dict[str, Callable[[Event], None]] = {}
        self.requests: list[Request] = []
        self.cancelled: list[str] = []
        self.lose_after, self.is_silent, self.is_full = lose_after, False, False
        self.error: BatonError = MemberLost("gone")

    def listen(self, request_id: str, num_tokens: int, listener: Callable[[Event], None]) -> None:
        self.listeners[request_id], self.in_flight[request_id] = listener, num_tokens

    def forget(self, request_id: str) -> None:
        self.listeners.pop(request_id, None)
        self.in_flight.pop(request_id, None)

    def cancel(self, request_id: str) -> None:
        self.cancelled.append(request_id)

    def reserve(self, request: Request) -> None:
        self.requests.append(request)
        if self.is_full:
            self.listeners[request.request_id](Failed("decode", Overloaded("full")))
            return
        granted = Reservation(request_id=request.request_id, decode=self.member, epoch=1, page_ids=(0,), slot_id=0, lease_s=5.0)
        self.listeners[request.request_id](Reserved(granted))


class FakePrefill(FakeRank):
    def __init__(self, decodes: list[FakeRank]) -> None:
        super().__init__("prefill")
        self.decodes = decodes
        self.handed_on: list[tuple[str, Reservation]] = []

    def run(self, request: Request, reservation: Reservation) -> None:
        """Decode's tokens are told before the first one, as they may be over two streams."""
        self.requests.append(request)
        decode = next(d for d in self.decodes if d.member == reservation.decode)
        if not decode.is_silent:
            self.produce(decode, request, reservation.request_id)
            self.tell_first(request.request_id, len(request.token_ids))
            self.lose(decode, request, reservation.request_id)

    def hand_on(self, request_id: str, reservation: Reservation) -> None:
        self.handed_on.append((request_id, reservation))
        request = next(request for request in self.requests if request.request_id == request_id)
        decode = next(d for d in self.decodes if d.member == reservation.decode)
        if not decode.is_silent:
            self.produce(decode, request, reservation.request_id)
            self.listeners[request_id](HandedOff(reservation.request_id, {}))
            self.lose(decode, request, reservation.request_id)

    def produce(self, decode: FakeRank, request: Request, rid: str) -> None:
        start = len(request.token_ids)
        last = request.prompt_len + request.sampling.max_tokens - 1
        for position in range(start + 1, min(last, start + decode.lose_after) + 1):
            finish = FinishReason.LENGTH if position == last else None
            decode.listeners[rid](Decoded(Tokens(request_id=rid, token_ids=(token_at(position),), finish_reason=finish)))

    def lose(self, decode: FakeRank, request: Request, rid: str) -> None:
        if len(request.token_ids) + decode.lose_after < request.prompt_len + request.sampling.max_tokens - 1:
            decode.listeners[rid](Failed("decode", decode.error))

    def tell_first(self, rid: str, position: int) -> None:
        self.listeners[rid](FirstToken(Tokens(request_id=rid, token_ids=(token_at(position),)), {}))
        self.listeners[rid](HandedOff(rid, {}))


class FakeMembers:
    def __init__(self, ranks: list[FakeRank]) -> None:
        self.ranks = ranks

    def ready(self, role: str) -> list[FakeRank]:
        return [rank for rank in self.ranks if rank.member.role == role]


def new_relay(ranks: list[FakeRank], **config: Any) -> Relay:
    return Relay(cast(Members, FakeMembers(ranks)), RouterConfig(**config), SystemClock())


def new_request() -> Request:
    return Request(request_id="r", token_ids=PROMPT, prompt_len=len(PROMPT), sampling=SamplingParams(max_tokens=MAX_TOKENS, seed=4))


def new_journey() -> Journey:
    return Journey("r", len(PROMPT), SystemClock().now())


async def tokens_of(relay: Relay, journey: Journey | None = None) -> list[int]:
    async with aclosing(relay.generate(new_request(), journey or new_journey())) as outputs:
        return [token async for output in outputs for token in output.token_ids]


EXPECTED = [token_at(position) for position in range(len(PROMPT), len(PROMPT) + MAX_TOKENS)]


def test_tokens_come_in_order_though_decode_overtakes_the_first() -> None:
    decode = FakeRank("decode")
    prefill = FakePrefill([decode])
    assert asyncio.run(tokens_of(new_relay([prefill, decode]))) == EXPECTED
    for rank in (prefill, decode):
        assert rank.cancelled == ["r.1"], "both sides are always told"
        assert not rank.listeners and not rank.in_flight


@pytest.mark.parametrize("reserved_only", [False, True])
def test_cancelling_reaches_both_ranks(reserved_only: bool) -> None:
    decode = FakeRank("decode")
    decode.is_silent = reserved_only
    prefill = FakePrefill([decode])

    async def leave() -> None:
        outputs = new_relay([prefill, decode]).generate(new_request(), new_journey())
        if reserved_only:
            task = asyncio.ensure_future(anext(outputs))
            await asyncio.sleep(0.01)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        else:
            await anext(outputs)
            await outputs.aclose()
        assert prefill.cancelled == decode.cancelled == ["r.1"], "by the time that closing returns"

    asyncio.run(leave())


@pytest.mark.parametrize("ticks", range(6))
def test_a_cancellation_that_meets_a_token_is_not_lost(ticks: int) -> None:
    decode = FakeRank("decode")
    decode.is_silent = True
    prefill = FakePrefill([decode])

    async def leave() -> None:
        task = asyncio.create_task(tokens_of(new_relay([prefill, decode])))
        await asyncio.sleep(0.01)
        prefill.tell_first("r.1", len(PROMPT))
        for _ in range(ticks):
            await asyncio.sleep(0)
        task.cancel()
        done, _ = await asyncio.wait({task}, timeout=0.5)
        still_running = not done
        if still_running:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        assert not still_running
        assert task.cancelled()

    asyncio.run(leave())


def test_a_lost_decode_rank_changes_no_token_and_sends_none_twice() -> None:
    decodes = [FakeRank("decode", 0, lose_after=2), FakeRank("decode", 1)]
    prefill = FakePrefill(decodes)
    journey = new_journey()
    tokens = asyncio.run(tokens_of(new_relay([prefill, *decodes]), journey))
    assert tokens == EXPECTED
    assert journey.attempts == 2
    again = prefill.requests[1]
    assert (again.request_id, again.prompt_len, again.sampling.seed) == ("r.2", len(PROMPT), 4)
    assert again.token_ids == (*PROMPT, *EXPECTED[:3])


def test_being_preempted_is_no_failure_of_the_rank_and_changes_no_token() -> None:
    decodes = [FakeRank("decode", 0, lose_after=1), FakeRank("decode", 1)]
    decodes[0].error = Preempted("out of pages")
    prefill = FakePrefill(decodes)
    journey = new_journey()
    assert asyncio.run(tokens_of(new_relay([prefill, *decodes], max_attempts=1), journey)) == EXPECTED
    assert (journey.attempts, journey.num_preemptions) == (3, 2)
    assert not decodes[1].requests, "the rank is not avoided"
    assert [len(request.token_ids) for request in prefill.requests] == [3, 5, 7]


def test_attempts_are_bounded() -> None:
    decode = FakeRank("decode", lose_after=0)
    prefill = FakePrefill([decode])
    journey = new_journey()
    with pytest.raises(MemberLost):
        asyncio.run(tokens_of(new_relay([prefill, decode], max_attempts=2), journey))
    assert journey.attempts == 2


def test_ranks_that_are_lost_before_they_worked_for_a_request_do_not_use_up_its_attempts() -> None:
    class Frozen(FakeRank):
        """Is lost while it is asked for pages, three times."""

        def reserve(self, request: Request) -> None:
            if len(self.requests) >= 3:
                return super().reserve(request)
            self.requests.append(request)
            return self.listeners[request.request_id](Failed("decode", MemberLost("nothing heard")))

    decode = Frozen("decode")
    prefill = FakePrefill([decode])
    journey = new_journey()
    assert asyncio.run(tokens_of(new_relay([prefill, decode], max_attempts=2), journey)) == EXPECTED
    assert (journey.attempts, journey.num_runs, len(prefill.requests)) == (4, 1, 1)


def test_without_members_a_request_waits_once_for_as_long_as_configured() -> None:
    journey, began = new_journey(), time.monotonic()
    with pytest.raises(NoMembers, match="prefill"):
        asyncio.run(tokens_of(new_relay([], wait_for_members_s=0.1), journey))
    assert 0.1 <= time.monotonic() - began < 1.0
    assert journey.attempts == 1


def two_decodes(lose_after: int) -> tuple[FakePrefill, FakeRank, FakeRank]:
    decodes = FakeRank("decode", 0, lose_after=lose_after), FakeRank("decode", 1)
    return FakePrefill(list(decodes)), *decodes


def test_a_decode_rank_lost_before_its_first_step_costs_no_second_prefill() -> None:
    prefill, lost, other = two_decodes(lose_after=0)
    journey = new_journey()
    assert asyncio.run(tokens_of(new_relay([prefill, lost, other]), journey)) == EXPECTED
    assert [request.request_id for request in prefill.requests] == ["r.1"], "one prefill"
    ((request_id, reservation),) = prefill.handed_on
    assert (request_id, reservation.request_id, reservation.decode) == ("r.1", "r.2", other.member)
    assert other.requests[0].token_ids == PROMPT, "what was computed, not what has been produced since"
    assert (journey.attempts, journey.hand_ons) == (2, 1)
    assert (prefill.cancelled, lost.cancelled, other.cancelled) == (["r.1"], ["r.1"], ["r.2"])
    assert not any(rank.listeners or rank.in_flight for rank in (prefill, lost, other))


def scripted(steps: Callable[[FakePrefill, FakeRank, FakeRank], None]) -> tuple[list[int], FakePrefill, Journey]:
    """Both decode ranks are silent; `steps` is called once the request is on the first one."""
    prefill, first, second = two_decodes(lose_after=10**6)
    first.is_silent = second.is_silent = True
    journey = new_journey()

    async def run() -> list[int]:
        task = asyncio.create_task(tokens_of(new_relay([prefill, first, second]), journey))
        await asyncio.sleep(0.01)
        steps(prefill, first, second)
        async with asyncio.timeout(5):
            return await task

    return asyncio.run(run()), prefill, journey


def test_a_failed_hand_off_goes_to_another_rank_and_late_news_of_the_first_is_ignored() -> None:
    def steps(prefill: FakePrefill, first: FakeRank, second: FakeRank) -> None:
        tell, told = prefill.listeners["r.1"], first.listeners["r.1"]
        tell(HandOffFailed("r.1", TransferFailed("cut")))
        second.is_silent = False
        told(Decoded(Tokens(request_id="r.1", token_ids=(token_at(len(PROMPT) + 1),))))
        told(Failed("decode", TransferFailed("cut")))
        tell(HandedOff("r.1", {}))
        tell(FirstToken(Tokens(request_id="r.1", token_ids=(token_at(len(PROMPT)),)), {}))

    tokens, prefill, journey = scripted(steps)
    assert tokens == EXPECTED
    assert len(prefill.requests) == 1 and journey.hand_ons == 1


def test_a_doubt_after_everything_landed_waits_for_what_decode_says() -> None:
    """Decode has it all and goes on; the prefill rank, which could not know, is told to forget it."""

    def steps(prefill: FakePrefill, first: FakeRank, second: FakeRank) -> None:
        prefill.tell_first("r.1", len(PROMPT))
        prefill.listeners["r.1"](HandOffFailed("r.1", MemberLost("link")))
        prefill.produce(first, prefill.requests[0], "r.1")

    tokens, prefill, journey = scripted(steps)
    assert tokens == EXPECTED
    assert not prefill.handed_on and journey.attempts == 1
    assert prefill.cancelled == ["r.1", "r.1"], "at the first token of decode, and at the end"


def test_what_is_kept_is_handed_on_when_decode_fails_after_that() -> None:
    def steps(prefill: FakePrefill, first: FakeRank, second: FakeRank) -> None:
        prefill.tell_first("r.1", len(PROMPT))
        prefill.listeners["r.1"](HandOffFailed("r.1", MemberLost("link")))
        second.is_silent = False
        first.listeners["r.1"](Failed("decode", MemberLost("link")))

    tokens, prefill, journey = scripted(steps)
    assert tokens == EXPECTED and len(prefill.requests) == 1 and journey.hand_ons == 1


def test_a_prefill_rank_lost_before_its_first_token_arrived_is_missed_though_decode_has_taken_over() -> None:
    def steps(prefill: FakePrefill, first: FakeRank, second: FakeRank) -> None:
        prefill.produce(first, prefill.requests[0], "r.1")
        first.is_silent = second.is_silent = False
        prefill.listeners["r.1"](Failed("prefill", MemberLost("gone")))

    tokens, prefill, journey = scripted(steps)
    assert tokens == EXPECTED
    assert len(prefill.requests) == journey.attempts == 2


def test_a_second_failure_runs_the_request_anew() -> None:
    prefill, first, second = two_decodes(lose_after=0)
    second.lose_after = 0
    third = FakeRank("decode", 2)
    prefill.decodes.append(third)
    journey = new_journey()
    assert asyncio.run(tokens_of(new_relay([prefill, first, second, third]), journey)) == EXPECTED
    assert [request.request_id for request in prefill.requests] == ["r.1", "r.3"]
    assert (journey.attempts, journey.hand_ons) == (3, 1)


def test_a_request_that_is_to_blame_itself_is_not_handed_on() -> None:
    prefill, first, second = two_decodes(lose_after=10**6)
    first.is_silent = True

    async def run() -> None:
        task = asyncio.create_task(tokens_of(new_relay([prefill, first, second])))
        await asyncio.sleep(0.01)
        first.listeners["r.1"](Failed("decode", InternalError("the step failed")))
        async with asyncio.timeout(5):
            await task

    with pytest.raises(InternalError):
        asyncio.run(run())
    assert not prefill.handed_on


def test_pages_are_not_kept_for_long_while_all_decode_ranks_are_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router.reserving, "KEPT_S", 0.05)
    prefill, first, second = two_decodes(lose_after=0)
    second.is_full = True
    first_reserve = first.reserve

    def reserve_once(request: Request) -> None:
        first_reserve(request)
        first.is_full = True

    first.reserve = reserve_once  # type: ignore[method-assign]
    journey = new_journey()

    async def run() -> list[int]:
        task = asyncio.create_task(tokens_of(new_relay([prefill, first, second]), journey))
        await asyncio.sleep(0.3)
        assert prefill.cancelled == ["r.1"], "the pages are free again"
        second.is_full = False
        return await task

    assert asyncio.run(run()) == EXPECTED
    assert not prefill.handed_on and len(prefill.requests) == 2


def test_the_next_turn_of_a_conversation_goes_where_the_last_one_was() -> None:
    decodes = [FakeRank("decode", replica) for replica in range(3)]
    prefill = FakePrefill(decodes)
    relay = new_relay([prefill, *decodes])
    prompt = tuple(range(2, 2 + 3 * PAGE_TOKENS))

    async def turn(name: str, token_ids: tuple[int, ...]) -> None:
        request = Request(request_id=name, token_ids=token_ids, prompt_len=len(token_ids), sampling=SamplingParams(max_tokens=MAX_TOKENS))
        async with aclosing(relay.generate(request, new_journey())) as outputs:
            async for _ in outputs:
                pass

    async def converse() -> None:
        decodes[0].in_flight["busy"] = 100
        decodes[1].in_flight["busy"] = 100
        await turn("first", prompt)
        for decode in decodes:
            decode.in_flight.clear()
        await turn("second", (*prompt, *prompt))
        await turn("other", (1, *prompt))

    asyncio.run(converse())
    assert [[request.request_id for request in decode.requests] for decode in decodes] == [["other.1"], [], ["first.1", "second.1"]]


def test_a_request_that_ends_with_its_first_token_is_not_expected_to_have_left_pages() -> None:
    decodes = [FakeRank("decode", replica) for replica in range(2)]
    prefill = FakePrefill(decodes)
    relay = new_relay([prefill, *decodes])
    prompt = tuple(range(2, 2 + PAGE_TOKENS))

    async def ask() -> None:
        decodes[0].is_silent = True
        request = Request(request_id="r", token_ids=prompt, prompt_len=PAGE_TOKENS, sampling=SamplingParams(max_tokens=MAX_TOKENS))
        outputs = relay.generate(request, new_journey())
        first = asyncio.ensure_future(anext(outputs))
        await asyncio.sleep(0.01)
        prefill.listeners["r.1"](FirstToken(Tokens(request_id="r.1", token_ids=(1,), finish_reason=FinishReason.STOP), {}))
        assert (await first).finish_reason is FinishReason.STOP
        await outputs.aclose()

    asyncio.run(ask())
    assert relay._reserver._prefixes.find(prompt) is None

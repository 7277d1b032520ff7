"""What a prefill rank keeps is handed to another decode rank when the first one fails: over scripted ranks."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

import router.reserving
from core.errors import InternalError, MemberLost, TransferFailed
from core.request import Request, Tokens
from router.relay import Journey
from router.session import Decoded, Failed, FirstToken, HandedOff, HandOffFailed
from tests.support.scripted_ranks import (
    EXPECTED,
    PROMPT,
    FakePrefill,
    FakeRank,
    new_journey,
    new_relay,
    token_at,
    tokens_of,
    until,
)


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
        await until(lambda: bool(prefill.requests))
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
        await until(lambda: bool(prefill.requests))
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
        await until(lambda: prefill.cancelled == ["r.1"])  # the pages are free again
        second.is_full = False
        return await task

    assert asyncio.run(run()) == EXPECTED
    assert not prefill.handed_on and len(prefill.requests) == 2

"""One request over ranks that are scripted in memory: order of events, retries, cancellation."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import aclosing
from typing import Any, cast

import pytest

from core.clock import SystemClock
from core.errors import MemberLost, NoMembers
from core.request import FinishReason, Load, Member, Request, Reservation, SamplingParams, Tokens
from router.config import RouterConfig
from router.members import Members
from router.relay import Journey, Relay
from router.session import Decoded, Event, Failed, FirstToken, HandedOff, Reserved

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
        self.lose_after, self.is_silent = lose_after, False

    def listen(self, request_id: str, num_tokens: int, listener: Callable[[Event], None]) -> None:
        self.listeners[request_id], self.in_flight[request_id] = listener, num_tokens

    def forget(self, request_id: str) -> None:
        self.listeners.pop(request_id, None)
        self.in_flight.pop(request_id, None)

    def cancel(self, request_id: str) -> None:
        self.cancelled.append(request_id)

    def reserve(self, request: Request) -> None:
        self.requests.append(request)
        self.listeners[request.request_id](Reserved(Reservation(decode=self.member, epoch=1, page_ids=(0,), slot_id=0, lease_s=5.0)))


class FakePrefill(FakeRank):
    def __init__(self, decodes: list[FakeRank]) -> None:
        super().__init__("prefill")
        self.decodes = decodes

    def run(self, request: Request, reservation: Reservation) -> None:
        """Decode's tokens are told before the first one, as they may be over two streams."""
        self.requests.append(request)
        rid, start = request.request_id, len(request.token_ids)
        decode = next(d for d in self.decodes if d.member == reservation.decode)
        if decode.is_silent:
            return
        last = request.prompt_len + request.sampling.max_tokens - 1
        for position in range(start + 1, min(last, start + decode.lose_after) + 1):
            finish = FinishReason.LENGTH if position == last else None
            decode.listeners[rid](Decoded(Tokens(request_id=rid, token_ids=(token_at(position),), finish_reason=finish)))
        self.tell_first(rid, start)
        if start + decode.lose_after < last:
            decode.listeners[rid](Failed("decode", MemberLost("gone")))

    def tell_first(self, rid: str, position: int) -> None:
        self.listeners[rid](FirstToken(Tokens(request_id=rid, token_ids=(token_at(position),)), {}))
        self.listeners[rid](HandedOff({}))


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


def test_attempts_are_bounded() -> None:
    decode = FakeRank("decode", lose_after=0)
    prefill = FakePrefill([decode])
    journey = new_journey()
    with pytest.raises(MemberLost):
        asyncio.run(tokens_of(new_relay([prefill, decode], max_attempts=2), journey))
    assert journey.attempts == 2


def test_without_members_a_request_waits_once_for_as_long_as_configured() -> None:
    journey, began = new_journey(), time.monotonic()
    with pytest.raises(NoMembers, match="prefill"):
        asyncio.run(tokens_of(new_relay([], wait_for_members_s=0.1), journey))
    assert 0.1 <= time.monotonic() - began < 1.0
    assert journey.attempts == 1

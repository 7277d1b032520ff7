"""Where requests go, over scripted ranks: waiting for members, and the next turn of a conversation."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import aclosing

import pytest

import router.line
import router.reserving
from core.clock import SystemClock
from core.errors import BatonError, DeadlineExceeded, Draining, MemberLost, NoMembers, Preempted, Unavailable
from core.kv_layout import PAGE_TOKENS
from core.request import FinishReason, Request, SamplingParams, Tokens
from router.reserving import FULL_POLL_S, full_poll_s
from router.session import Failed, FirstToken
from tests.support.scripted_ranks import (
    MAX_TOKENS,
    FakePrefill,
    FakeRank,
    new_journey,
    new_relay,
    tokens_of,
    until,
)


def test_without_members_a_request_waits_once_for_as_long_as_configured() -> None:
    journey, began = new_journey(), time.monotonic()
    with pytest.raises(NoMembers, match="prefill"):
        asyncio.run(tokens_of(new_relay([], wait_for_members_s=0.1), journey))
    assert 0.1 <= time.monotonic() - began < 10.0, "by default it is 30 s"
    assert journey.attempts == 1


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
        await until(lambda: bool(prefill.requests))
        prefill.listeners["r.1"](FirstToken(Tokens(request_id="r.1", token_ids=(1,), finish_reason=FinishReason.STOP), {}))
        assert (await first).finish_reason is FinishReason.STOP
        await outputs.aclose()

    asyncio.run(ask())
    assert relay._reserver._prefixes.find(prompt) is None


def test_requests_that_arrive_together_are_spread_over_prefill_ranks() -> None:
    """Their pages are granted a while after they are asked for, as by a rank that is not in this process."""
    decode = FakeRank("decode")
    prefills = [FakePrefill([decode], replica) for replica in (0, 1)]
    relay, grant, waiting = new_relay([*prefills, decode]), decode.reserve, list[Request]()
    decode.reserve, decode.is_silent = waiting.append, True  # type: ignore[method-assign]

    async def ask() -> None:
        requests = [
            Request(request_id=f"r{n}", token_ids=(5,) * 300, prompt_len=300, sampling=SamplingParams(max_tokens=MAX_TOKENS))
            for n in range(8)
        ]
        tasks = [asyncio.ensure_future(anext(relay.generate(request, new_journey()))) for request in requests]
        await until(lambda: len(waiting) == 8)
        assert not any(prefill.requests for prefill in prefills)
        for request in waiting:
            grant(request)
        await until(lambda: sum(len(prefill.requests) for prefill in prefills) == 8)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(ask())
    assert [len(prefill.requests) for prefill in prefills] == [4, 4]


class LosingRank(FakeRank):
    """Its peers of prefill are gone when it grants pages."""

    def __init__(self, ranks: list[FakeRank]) -> None:
        super().__init__("decode")
        self._ranks = ranks

    def reserve(self, request: Request) -> None:
        self._ranks[:] = [self]
        super().reserve(request)


def new_losing() -> tuple[list[FakeRank], FakePrefill, LosingRank]:
    ranks: list[FakeRank] = []
    decode = LosingRank(ranks)
    prefill = FakePrefill([decode])
    ranks += [prefill, decode]
    return ranks, prefill, decode


def test_pages_are_given_back_when_no_prefill_rank_is_left_to_fill_them() -> None:
    ranks, prefill, decode = new_losing()
    relay = new_relay(ranks, wait_for_members_s=0.0)
    with pytest.raises(NoMembers, match="no prefill rank is ready"):
        asyncio.run(tokens_of(relay))
    assert decode.cancelled == ["r.1"] and not decode.in_flight and not prefill.requests


def test_a_decode_rank_is_not_blamed_for_a_prefill_rank_that_is_gone() -> None:
    ranks, _, decode = new_losing()
    reserver = new_relay(ranks)._reserver
    avoid: list[tuple[str, int]] = []

    async def ask() -> None:
        request = Request(request_id="r", token_ids=(5,), prompt_len=1, sampling=SamplingParams(max_tokens=MAX_TOKENS))
        now = SystemClock().now()
        with pytest.raises(Unavailable, match="is ready any more"):
            await reserver.reserve(request, asyncio.Queue(), avoid, now, now + 5)

    asyncio.run(ask())
    assert decode.cancelled == ["r"] and not decode.in_flight and not avoid


def test_a_request_whose_time_is_up_leaves_the_line_though_others_wait_before_it() -> None:
    prefill, decode = FakePrefill([]), FakeRank("decode")
    decode.is_full = True
    reserver, clock = new_relay([prefill, decode])._reserver, SystemClock()

    async def wait(name: str, seconds: float) -> None:
        request = Request(request_id=name, token_ids=(5,), prompt_len=1, sampling=SamplingParams(max_tokens=MAX_TOKENS))
        await reserver.reserve(request, asyncio.Queue(), [], clock.now(), clock.now() + seconds)

    async def run() -> None:
        first = asyncio.create_task(wait("first", 60.0))
        await until(lambda: bool(decode.requests))
        async with asyncio.timeout(10):
            with pytest.raises(DeadlineExceeded):
                await wait("second", 0.05)
        assert not first.done()
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)

    asyncio.run(run())


class Roomy(FakeRank):
    """Grants as many as it has room for."""

    def __init__(self, replica: int = 0) -> None:
        super().__init__("decode", replica)
        self.room = 0

    def reserve(self, request: Request) -> None:
        self.is_full = self.room == 0
        self.room -= not self.is_full
        super().reserve(request)


def new_line(decodes: list[Roomy]) -> tuple[Callable[[str], asyncio.Task[None]], list[str]]:
    """What has a request of this name wait for room, and the names in the order of their grants."""
    reserver, granted = new_relay([FakePrefill([]), *decodes])._reserver, list[str]()

    async def wait(name: str) -> None:
        request = Request(request_id=name, token_ids=(5,), prompt_len=1, sampling=SamplingParams(max_tokens=MAX_TOKENS))
        now = SystemClock().now()
        await reserver.reserve(request, asyncio.Queue(), [], now, now + 30)
        granted.append(name)

    return lambda name: asyncio.create_task(wait(name)), granted


def test_who_comes_later_does_not_go_before_those_in_line() -> None:
    async def run() -> None:
        decode = Roomy()
        ask, granted = new_line([decode])
        tasks = [ask("first"), ask("second")]
        await asyncio.sleep(0.01)
        decode.room = 1
        tasks.append(ask("late"))
        while not granted:
            await asyncio.sleep(0.005)
        assert granted == ["first"]
        decode.room = 2
        await asyncio.gather(*tasks)
        assert granted == ["first", "second", "late"]

    asyncio.run(run())


@pytest.mark.parametrize(
    ("error", "next_in_line"),
    [(MemberLost("gone"), "first.2"), (Draining("about to go"), "first.2"), (Preempted("out of pages"), "second.1")],
)
def test_who_loses_a_rank_has_its_place_by_arrival_and_who_is_preempted_is_the_last(error: BatonError, next_in_line: str) -> None:
    async def run() -> None:
        decode = Roomy()
        decode.room, decode.is_silent = 1, True
        prefill = FakePrefill([decode])
        relay, tasks = new_relay([prefill, decode]), list[asyncio.Task[None]]()

        async def ask(name: str) -> None:
            request = Request(request_id=name, token_ids=(5,), prompt_len=1, sampling=SamplingParams(max_tokens=MAX_TOKENS))
            async with aclosing(relay.generate(request, new_journey())) as outputs:
                async for _ in outputs:
                    pass

        tasks.append(asyncio.create_task(ask("first")))
        await until(lambda: bool(prefill.requests))
        tasks.append(asyncio.create_task(ask("second")))
        await until(lambda: relay.num_in_line == 1)
        tasks.append(asyncio.create_task(ask("third")))
        await until(lambda: relay.num_in_line == 2)
        prefill.listeners["first.1"](Failed("decode" if isinstance(error, Preempted) else "prefill", error))
        await until(lambda: relay.num_in_line == 3)
        decode.room = 1
        await until(lambda: len(prefill.requests) > 1)
        assert prefill.requests[1].request_id == next_in_line
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(run())


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_small_requests_pass_a_large_one_but_leave_a_rank_to_it_in_the_end(num_ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router.line, "PASSED_AFTER_S", 0.02)
    monkeypatch.setattr(router.line, "CLAIMS_AFTER_S", 0.4)

    class Busy(Roomy):
        """A large request needs much, of which small ones take each bit that comes free."""

        def reserve(self, request: Request) -> None:
            need = 10 if request.request_id == "large" else 1
            self.is_full = self.room < need
            self.room -= 0 if self.is_full else need
            FakeRank.reserve(self, request)

    async def run() -> None:
        decodes: list[Roomy] = [Busy(replica) for replica in range(num_ranks)]
        ask, granted = new_line(decodes)
        tasks, end = [ask("large")], time.monotonic() + 20
        while "large" not in granted:
            tasks.append(ask(f"small {len(tasks)}"))
            for decode in decodes:
                decode.room += 1
            await asyncio.sleep(0.01)
            assert time.monotonic() < end
        place = granted.index("large")
        assert place > 0, "it was passed at first"
        assert num_ranks == 1 or place > 10, "others went on elsewhere"
        for decode in decodes:
            decode.room = len(tasks)
        await asyncio.gather(*tasks)

    asyncio.run(run())


def test_a_long_line_is_gone_soon_when_much_room_comes_at_once() -> None:
    async def run() -> None:
        decode = Roomy()
        ask, granted = new_line([decode])
        tasks = [ask(str(number)) for number in range(200)]
        await asyncio.sleep(0.05)
        assert len(decode.requests) < 210, "one asks while there is no room"
        decode.room, began = 200, time.monotonic()
        await asyncio.gather(*tasks)
        assert time.monotonic() - began < 100 * FULL_POLL_S
        assert [int(name) for name in granted] == list(range(200))

    asyncio.run(run())


def test_a_rank_that_does_not_answer_holds_up_who_asked_it_and_not_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router.reserving, "SLOW_ANSWER_S", 0.02)

    async def run() -> None:
        decode = Roomy()
        ask, granted = new_line([decode])
        tasks = [ask("first"), ask("second")]
        await asyncio.sleep(0.01)
        unanswered = list[Request]()
        answers, decode.reserve = decode.reserve, unanswered.append  # type: ignore[method-assign]
        while not unanswered:
            await asyncio.sleep(0.001)
        assert [request.request_id for request in unanswered] == ["first"]
        decode.room, decode.reserve = 1, answers  # type: ignore[method-assign]
        await tasks[1]
        assert granted == ["second"]
        tasks[0].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(run())


def test_those_in_line_wait_side_by_side_for_ranks_that_are_gone() -> None:
    async def run() -> float:
        ranks: list[FakeRank] = [FakePrefill([]), Roomy()]
        relay, began = new_relay(ranks, wait_for_members_s=0.1), time.monotonic()
        reserver = relay._reserver

        async def wait(number: int) -> None:
            request = Request(request_id=str(number), token_ids=(5,), prompt_len=1, sampling=SamplingParams(max_tokens=MAX_TOKENS))
            now = SystemClock().now()
            with pytest.raises(NoMembers):
                await reserver.reserve(request, asyncio.Queue(), [], now, now + 30)

        tasks = [asyncio.create_task(wait(number)) for number in range(50)]
        while relay.num_in_line < 20:
            await asyncio.sleep(0.001)
        del ranks[1]
        await asyncio.gather(*tasks)
        assert relay.num_in_line == 0
        return time.monotonic() - began

    assert asyncio.run(run()) < 3.0, "one after the other they take 5 s"


def test_room_for_a_long_prompt_is_asked_for_less_often() -> None:
    class Full(FakeRank):
        """Until it is asked for the fourth time."""

        def reserve(self, request: Request) -> None:
            self.is_full = len(self.requests) < 3
            super().reserve(request)

    async def ask(decode: FakeRank, num_tokens: int, seconds: float) -> None:
        request = Request(request_id="r", token_ids=(5,) * num_tokens, prompt_len=1, sampling=SamplingParams(max_tokens=MAX_TOKENS))
        now = SystemClock().now()
        await new_relay([FakePrefill([]), decode])._reserver.reserve(request, asyncio.Queue(), [], now, now + seconds)

    short, long = Full("decode"), Full("decode")
    asyncio.run(ask(short, 20_000, 30.0))
    with pytest.raises(DeadlineExceeded):
        asyncio.run(ask(long, 200_000, 0.1))
    assert (len(short.requests), len(long.requests)) == (4, 1)
    assert [full_poll_s(num_tokens) for num_tokens in (1, 20_000, 131_072, 1_000_000)] == pytest.approx([0.02, 0.02, 0.131, 1.0], rel=0.01)

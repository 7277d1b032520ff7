"""One request over scripted ranks: order of events, retries, cancellation."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest

from core.errors import MemberLost, Overloaded, Preempted
from core.request import Request, Reservation, TokenLogprobs
from router.session import Failed, PromptScored
from tests.support.scripted_ranks import (
    EXPECTED,
    PROMPT,
    FakePrefill,
    FakeRank,
    new_journey,
    new_relay,
    new_request,
    tokens_of,
    until,
)


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
            await until(lambda: bool(prefill.requests))
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
        await until(lambda: bool(prefill.requests))
        prefill.tell_first("r.1", len(PROMPT))
        for _ in range(ticks):
            await asyncio.sleep(0)
        task.cancel()
        done, _ = await asyncio.wait({task}, timeout=5)
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
    assert (journey.attempts, journey.num_migrations) == (2, 1)
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


@pytest.mark.parametrize(("lose_after", "expected"), [(2, EXPECTED), (10**6, None)])
def test_who_has_tokens_already_waits_for_a_prefill_rank_that_takes_no_more_and_who_has_none_is_sent_away(
    lose_after: int, expected: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All sequences of a large decode rank that is lost may be more than `prefill.max_waiting`."""

    class Full(FakePrefill):
        """Refuses its second to fourth run, or the first one, if that is to be the only one."""

        num_refused = 0

        def run(self, request: Request, reservation: Reservation) -> None:
            if (self.requests or expected is None) and self.num_refused < 3:
                self.num_refused += 1
                return self.listeners[request.request_id](Failed("prefill", Overloaded("256 requests are waiting")))
            return super().run(request, reservation)

    monkeypatch.setattr("router.relay.RETRY_S", 0.001)
    decodes = [FakeRank("decode", 0, lose_after=lose_after), FakeRank("decode", 1)]
    prefill, journey = Full(decodes), new_journey()
    reading = tokens_of(new_relay([prefill, *decodes], max_attempts=2), journey)
    if expected is None:
        with pytest.raises(Overloaded):
            asyncio.run(reading)
        assert prefill.num_refused == 1
        return
    assert asyncio.run(reading) == expected
    assert (prefill.num_refused, journey.num_migrations) == (3, 1), "being refused is no run"


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
    assert journey.num_migrations == 0, "nothing ran twice"


def test_log_probabilities_of_the_prompt_reach_the_client_once_though_two_runs_score_it() -> None:
    class Scoring(FakePrefill):
        """Scores the first `self.num_scored` tokens but one, a token each, before it computes."""

        num_scored = 2

        def run(self, request: Request, reservation: Reservation) -> None:
            for position in range(1, self.num_scored):
                self.listeners[request.request_id](PromptScored(position, (TokenLogprobs(logprob=-float(position)),)))
            if len(self.requests) == 0:
                self.requests.append(request)
                self.listeners[request.request_id](Failed("prefill", MemberLost("gone")))
                self.num_scored = len(PROMPT)
            else:
                super().run(request, reservation)

    decode = FakeRank("decode")
    relay = new_relay([Scoring([decode]), decode])

    async def read() -> list[tuple[int, float]]:
        async with aclosing(relay.generate(new_request(), new_journey())) as outputs:
            return [(out.prompt_start + n, found.logprob) async for out in outputs for n, found in enumerate(out.prompt_logprobs)]

    assert asyncio.run(read()) == [(1, -1.0), (2, -2.0)]

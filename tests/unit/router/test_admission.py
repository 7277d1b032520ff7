"""Room in a router: what is refused, and what those who come back when they were told to find."""

from __future__ import annotations

import heapq
import math

import pytest

from core.errors import Overloaded
from router.admission import MAX_RETRY_S, UNKNOWN_S, Admission
from tests.support.manual_clock import ManualClock


def new_admission(clock: ManualClock, max_requests: int = 10, max_waiting_tokens: int = 10**9) -> Admission:
    return Admission(max_requests=max_requests, max_waiting_tokens=max_waiting_tokens, clock=clock)


def refusal(admission: Admission, num_requests: int = 1, num_tokens: int = 1) -> float:
    with pytest.raises(Overloaded) as caught:
        admission.enter(num_requests, num_tokens)
    return caught.value.retry_after_s


def crowd(num_clients: int, capacity: int, service_s: float) -> tuple[list[int], float]:
    """All come at once and come back exactly when they are told. Tries of each client, and when the last has been served."""
    clock = ManualClock()
    admission = new_admission(clock, capacity)
    tries = [0] * num_clients
    events = [(0.0, number, "try") for number in range(num_clients)]
    while events:
        when, number, what = heapq.heappop(events)
        clock.advance(when - clock.now())
        if what == "done":
            admission.leave(1, service_s)
            continue
        tries[number] += 1
        try:
            admission.enter(1, 1)
        except Overloaded as error:
            heapq.heappush(events, (when + math.ceil(error.retry_after_s), number, "try"))
        else:
            admission.first_token(1, 0.0)
            heapq.heappush(events, (when + service_s, number, "done"))
    assert admission.num_requests == 0
    return tries, clock.now()


@pytest.mark.parametrize(("num_clients", "capacity", "service_s"), [(200, 10, 2.0), (500, 50, 3.0), (60, 4, 7.3), (2000, 100, 1.0)])
def test_a_crowd_that_does_as_it_is_told_is_served_nearly_at_full_rate_in_few_tries(
    num_clients: int, capacity: int, service_s: float
) -> None:
    tries, seconds = crowd(num_clients, capacity, service_s)
    least_s = math.ceil(num_clients / capacity) * service_s
    assert sum(tries) / num_clients < 5, f"{sum(tries) / num_clients:.1f} tries a client, at most {max(tries)}"
    assert seconds < 1.4 * least_s, f"{seconds:.1f} s, at least {least_s:.1f}"


def test_bounds_are_kept_and_counted_back() -> None:
    admission = new_admission(ManualClock(), max_requests=2, max_waiting_tokens=100)
    admission.enter(1, 80)
    with pytest.raises(Overloaded, match="80 prompt tokens wait, the limit is 100"):
        admission.enter(1, 30)
    admission.first_token(80, 1.0)
    admission.enter(1, 30)
    with pytest.raises(Overloaded, match="2 requests are in progress, the limit is 2"):
        admission.enter(1, 1)
    admission.leave(1, 1.0)
    admission.enter(1, 1)
    assert (admission.num_requests, admission.waiting_tokens) == (2, 31)


def test_one_request_always_fits_an_empty_router() -> None:
    admission = new_admission(ManualClock(), max_requests=2, max_waiting_tokens=10)
    admission.enter(16, 10_000)
    assert refusal(admission) == UNKNOWN_S


def test_turns_are_as_far_apart_as_room_comes_free() -> None:
    clock = ManualClock()
    admission = new_admission(clock)
    admission.enter(10, 1)
    for _ in range(20):  # ten places, each for five seconds: two come free a second
        admission.leave(1, 5.0)
        admission.enter(1, 1)
    turns = [refusal(admission) for _ in range(10)]
    assert turns == pytest.approx([max(1.0, 0.5 * place) for place in range(1, 11)])
    clock.advance(4.0)
    assert refusal(admission, num_requests=3) == pytest.approx(1.0 + 1.5), "behind those whose turn is to come, three places wide"


def test_those_who_stay_away_do_not_slow_the_turns_of_others() -> None:
    clock = ManualClock()
    admission = new_admission(clock)
    for _ in range(50):  # a tenth of what would fit
        admission.enter(1, 1)
        clock.advance(0.5)
        admission.leave(1, 0.5)
    admission.enter(10, 1)
    assert refusal(admission) == 1.0


def test_an_unknown_rate_and_a_long_line_are_bounded() -> None:
    clock = ManualClock()
    admission = new_admission(clock)
    admission.enter(10, 1)
    assert refusal(admission) == UNKNOWN_S
    admission.leave(1, 100.0)
    admission.enter(1, 1)
    assert [refusal(admission) for _ in range(20)][-1] == MAX_RETRY_S
    clock.advance(29.0)
    assert 31.0 <= refusal(admission) <= MAX_RETRY_S
    clock.advance(2.0)
    assert refusal(admission) == UNKNOWN_S, "what was measured is too old"


def test_prompt_tokens_have_a_room_and_turns_of_their_own() -> None:
    admission = new_admission(ManualClock(), max_requests=1000, max_waiting_tokens=10_000)
    admission.enter(1, 9_000)
    admission.first_token(9_000, 20.0)  # 10,000 tokens in 20 s
    admission.enter(1, 8_000)
    assert refusal(admission, num_tokens=6_000) == pytest.approx(12.0)
    admission.enter(1, 2_000)
    assert admission.waiting_tokens == 10_000

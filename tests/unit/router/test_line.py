"""Who of those that wait for room may ask for it, and where."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from router.line import CLAIMS_AFTER_S, MAX_FRONT, PASSED_AFTER_S, PASSING_FRONT, Line, Place
from tests.support.manual_clock import ManualClock

RANKS = [("decode/0.0", 1), ("decode/1.0", 2)]


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def line(clock: ManualClock) -> Line:
    return Line(clock)


@pytest.fixture
def places(line: Line, clock: ManualClock) -> Iterator[list[Place]]:
    """Of 200 requests in line."""
    with contextlib.ExitStack() as stack:
        found = [stack.enter_context(line.place(clock.now())) for _ in range(200)]
        for place in found:
            place.join()
        yield found
    assert len(line) == 0


def asking(places: list[Place]) -> list[int]:
    return [number for number, place in enumerate(places) if place.may_ask.is_set()]


def leave(place: Place) -> None:
    place.granted()
    place.give_up()
    place.may_ask.clear()


def test_grants_double_who_may_ask_and_a_refusal_leaves_the_oldest(places: list[Place]) -> None:
    assert asking(places) == [0]
    for gone in range(8):
        leave(places[gone])
        assert asking(places) == list(range(gone + 1, gone + 1 + min(2 ** (gone + 1), MAX_FRONT)))
    places[20].refused(RANKS)
    assert asking(places) == [8]


def test_an_oldest_one_that_is_refused_for_long_is_passed_by_some(places: list[Place], clock: ManualClock) -> None:
    clock.advance(PASSED_AFTER_S + 0.1)
    places[0].refused(RANKS)
    assert asking(places) == list(range(PASSING_FRONT))
    leave(places[0])
    places[1].refused(RANKS)
    assert asking(places) == [1], "the next one has not waited yet"


def test_the_oldest_claims_a_rank_in_the_end_until_it_leaves(places: list[Place], clock: ManualClock) -> None:
    clock.advance(CLAIMS_AFTER_S + 0.1)
    places[1].refused(RANKS)
    assert not places[2].forbidden(), "only the oldest may"
    places[0].refused(RANKS)
    places[0].refused(RANKS[::-1])
    assert not places[0].forbidden() and all(place.forbidden() == [RANKS[0]] for place in places[1:])
    places[0].refused(RANKS[1:])
    assert places[1].forbidden() == [RANKS[1]], "the other is gone"
    leave(places[0])
    assert not any(place.forbidden() for place in places)


def test_where_there_is_no_rank_nobody_waits_for_another(line: Line, places: list[Place]) -> None:
    line.disperse()
    assert asking(places) == list(range(200))
    places[50].refused(RANKS)
    assert asking(places) == [0]


def test_who_gave_up_his_place_while_the_front_was_narrowed_waits_for_nobody(places: list[Place]) -> None:
    """It asks, another one is refused, its own answer takes long, and is a refusal by one rank of several."""
    leave(places[0])
    slow = places[2]
    assert asking(places) == [1, 2]
    places[1].refused(RANKS)
    assert not slow.may_ask.is_set()
    slow.give_up()
    assert slow.may_ask.is_set(), "or nobody would call it ever again"
    slow.refused(RANKS)
    assert not slow.may_ask.is_set() and asking(places) == [1], "it is the last one now"


def test_who_gave_up_his_place_and_is_refused_is_the_last(places: list[Place]) -> None:
    places[0].give_up()
    places[0].refused(RANKS)
    assert asking(places) == [1]


def test_who_lost_a_rank_has_its_place_by_arrival_and_takes_nobodys_turn_away(clock: ManualClock) -> None:
    line = Line(clock)
    with contextlib.ExitStack() as stack:
        places = [stack.enter_context(line.place(float(arrived))) for arrived in range(4)]
        for number in (1, 3, 2, 0):
            places[number].join()
        assert asking(places) == [0], "the one that might ask until the oldest came does not any more"
        leave(places[0])
        assert asking(places) == [1, 2]
        for place in places[1:]:
            leave(place)

"""Who of those that wait for room may ask for it."""

from __future__ import annotations

import contextlib

from router.line import MAX_FRONT, Line, Place


def asking(places: list[Place]) -> list[int]:
    return [number for number, place in enumerate(places) if place.may_ask.is_set()]


def test_grants_double_who_may_ask_and_a_refusal_leaves_the_oldest() -> None:
    line = Line()
    with contextlib.ExitStack() as stack:
        places = [stack.enter_context(line.place()) for _ in range(200)]
        for place in places:
            place.join()
        assert asking(places) == [0]
        for gone, front in ((0, [1, 2]), (1, [2, 3, 4, 5]), (2, [3, 4, 5, 6, 7, 8, 9, 10])):
            places[gone].granted()
            places[gone].give_up()
            places[gone].may_ask.clear()
            assert asking(places) == front
        places[5].refused()
        assert asking(places) == [3]
        for _ in range(20):
            line.widen()
        line.join(places[3])
        assert asking(places) == list(range(3, 3 + MAX_FRONT))
        places[4].refused()
        line.disperse()
        assert asking(places) == list(range(3, 200))
    assert line.is_empty


def test_who_gave_up_his_place_and_is_refused_is_the_last() -> None:
    line = Line()
    with line.place() as first, line.place() as second:
        first.join()
        second.join()
        first.give_up()
        assert second.may_ask.is_set()
        first.refused()
        assert second.may_ask.is_set() and not first.may_ask.is_set()
    assert line.is_empty

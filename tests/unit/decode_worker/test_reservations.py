"""Reservations: who may have pages, for how long, and why they are given up."""

from __future__ import annotations

import dataclasses

import pytest

from core.errors import DeadlineExceeded, InvalidRequest, Overloaded, TransferFailed
from core.request import Request, SamplingParams
from decode_worker.reservations import Reservations
from engine.scheduler.decode import DecodePlanner
from engine.sequence import Sequence


def new_request(name: str, prompt: int = 300, max_tokens: int = 400, deadline_s: float = 60.0) -> Request:
    return Request(
        request_id=name,
        token_ids=(7,) * prompt,
        prompt_len=prompt,
        sampling=SamplingParams(max_tokens=max_tokens),
        deadline_s=deadline_s,
    )


def new_reservations(num_pages: int = 8, num_slots: int = 4, expected_output: float = 1.0) -> Reservations:
    return Reservations(num_pages=num_pages, num_slots=num_slots, lease_s=5.0, expected_output=expected_output)


def test_a_silent_sender_may_be_replaced_but_a_deadline_is_final() -> None:
    reservations = new_reservations()
    silent = reservations.reserve(new_request("silent"), 0.0)
    late = reservations.reserve(new_request("late", deadline_s=8.0), 0.0)
    reservations.renewed(late.epoch, 4.0)
    assert reservations.expired(5.0) == []
    (first,) = reservations.expired(5.1)
    assert first.held is silent and isinstance(first.error, TransferFailed) and first.error.retryable
    reservations.end("silent")
    reservations.renewed(late.epoch, 7.9)
    (second,) = reservations.expired(8.1)
    assert second.held is late and isinstance(second.error, DeadlineExceeded) and not second.error.retryable


def test_a_reservation_aborted_before_its_first_step_keeps_its_pages_until_quiesced() -> None:
    reservations = new_reservations()
    held = reservations.reserve(new_request("a"), 0.0)
    reservations.committed(held.epoch, 3)
    reservations.end("a")
    assert (reservations.pages.num_free, reservations.num_quarantined) == (6, 1)
    assert reservations.committed(held.epoch, 3) is None
    reservations.check_integrity()
    reservations.quiesced(held.epoch)
    reservations.quiesced(held.epoch)
    assert (reservations.pages.num_free, reservations.slots.num_free) == (8, 4)


@pytest.mark.parametrize(("expected_output", "fitting"), [(1.0, 2), (0.5, 4), (0.01, 4)])
def test_the_expected_output_decides_how_many_fit(expected_output: float, fitting: int) -> None:
    """300 + 400 tokens are 3 pages at worst, 2 if half the output is expected; the prompt and one token need 2 anyway."""
    reservations = new_reservations(num_slots=9, expected_output=expected_output)
    for number in range(fitting):
        reservations.reserve(new_request(f"r{number}"), 0.0)
    with pytest.raises(Overloaded, match="pages"):
        reservations.reserve(new_request("more"), 0.0)


def test_what_was_given_up_once_is_let_in_with_room_for_all_of_it() -> None:
    reservations = new_reservations(num_slots=9, expected_output=0.01)
    for number in range(2):
        reservations.reserve(new_request(f"r{number}"), 0.0)
    again = dataclasses.replace(new_request("again", prompt=310), prompt_len=300)  # ten tokens were produced
    reservations.reserve(again, 0.0)
    with pytest.raises(Overloaded, match="pages"):
        reservations.reserve(new_request("more"), 0.0)  # 2 + 2 + 3 are promised, though 6 are taken
    assert reservations.pages.num_free == 2


def test_what_can_never_fit_is_refused_for_good_even_if_overcommitted() -> None:
    reservations = new_reservations(expected_output=0.01)
    with pytest.raises(InvalidRequest, match="need 10 pages"):
        reservations.reserve(new_request("huge", prompt=300, max_tokens=8 * 256), 0.0)


def test_slots_are_counted_too() -> None:
    reservations = new_reservations(num_slots=1)
    reservations.reserve(new_request("a", prompt=3, max_tokens=3), 0.0)
    with pytest.raises(Overloaded, match="slots"):
        reservations.reserve(new_request("b", prompt=3, max_tokens=3), 0.0)
    reservations.check_integrity()


@pytest.mark.parametrize("lacks", ["pages", "slots"])
def test_no_digests_are_made_of_a_prompt_that_is_refused(lacks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes again and again, from each router's first in line."""
    reservations = new_reservations(num_pages=4 if lacks == "pages" else 8, num_slots=1 if lacks == "slots" else 4)
    reservations.reserve(new_request("a"), 0.0)
    monkeypatch.setattr("decode_worker.reservations.page_digests", lambda token_ids: pytest.fail("digests"))
    for _ in range(3):
        with pytest.raises(Overloaded, match=lacks):
            reservations.reserve(new_request("b"), 0.0)
    reservations.check_integrity()


def turn(name: str, token_ids: tuple[int, ...]) -> Request:
    return Request(request_id=name, token_ids=token_ids, prompt_len=len(token_ids), sampling=SamplingParams(max_tokens=10))


def run_through(reservations: Reservations, request: Request) -> None:
    held = reservations.reserve(request, 0.0)
    reservations.committed(held.epoch, 3)
    reservations.started(request.request_id)
    reservations.end(request.request_id)


def test_the_next_turn_of_a_conversation_finds_the_whole_pages_of_the_last_prompt() -> None:
    reservations = new_reservations(num_pages=12)
    first = tuple(range(700))  # two whole pages
    run_through(reservations, turn("a", first))
    assert reservations.pages.num_free == 12, "kept pages are free"
    held = reservations.reserve(turn("b", (*first, *range(500))), 1.0)
    assert (held.num_kept_pages, len(held.page_ids)) == (2, 5)
    other = reservations.reserve(turn("c", first), 1.0)
    assert other.num_kept_pages == 0, "they have an owner now"
    assert not set(held.page_ids) & set(other.page_ids)
    reservations.check_integrity()


def test_pages_that_may_never_have_been_filled_are_not_kept() -> None:
    reservations = new_reservations(num_pages=12)
    held = reservations.reserve(turn("a", tuple(range(700))), 0.0)
    reservations.end("a")
    reservations.quiesced(held.epoch)
    assert reservations.pages.num_kept == 0 and reservations.pages.num_free == 12


def test_a_turn_that_is_given_up_before_its_pages_are_here_leaves_those_that_were() -> None:
    """The client leaves during the prefill, or the prefill rank dies: its next try need not send the conversation anew."""
    reservations = new_reservations(num_pages=12)
    first = tuple(range(700))
    run_through(reservations, turn("a", first))
    second = (*first, *range(500))
    for name in ("b", "c"):
        held = reservations.reserve(turn(name, second), 1.0)
        assert held.num_kept_pages == 2
        reservations.renewed(held.epoch, 1.0)
        reservations.end(name)
        assert reservations.pages.num_kept == 0, "all of it is in quarantine"
        reservations.quiesced(held.epoch)
        assert reservations.pages.num_kept == 2
    reservations.check_integrity()


def test_a_prompt_that_has_arrived_is_kept_though_it_was_given_up_before_its_first_step() -> None:
    reservations = new_reservations(num_pages=12)
    held = reservations.reserve(turn("a", tuple(range(700))), 0.0)
    reservations.committed(held.epoch, 3)
    reservations.end("a")
    reservations.quiesced(held.epoch)
    assert reservations.reserve(turn("b", tuple(range(700))), 1.0).num_kept_pages == 2


def test_a_sequence_that_is_given_up_for_want_of_pages_leaves_its_prompt_until_they_are_needed() -> None:
    reservations = new_reservations(num_pages=6, expected_output=0.01)
    old, young = (reservations.reserve(turn(name, tuple(range(start, start + 600))), 0.0) for name, start in (("old", 0), ("young", 1000)))
    running = []
    for held in (old, young):
        reservations.committed(held.epoch, 3)
        reservations.started(held.request.request_id)
        running.append(Sequence.from_request(held.request))
        running[-1].page_ids, running[-1].num_computed = list(held.page_ids), 3 * 256
        running[-1].token_ids += [5] * (3 * 256 + 1 - 600)
        running[-1].request = dataclasses.replace(held.request, sampling=SamplingParams(max_tokens=400))
    plan = DecodePlanner(max_running=2).plan(running, reservations.pages)
    assert [sequence.request_id for sequence in plan.preempted] == ["young"]
    reservations.end("young")
    again = reservations.reserve(turn("again", tuple(range(1000, 1256))), 1.0)
    assert again.num_kept_pages == 1 and reservations.pages.num_kept == 1
    reservations.check_integrity()


@pytest.mark.parametrize("has_started", [False, True])
def test_pages_of_what_came_to_nothing_in_a_step_are_not_given_to_its_next_try(has_started: bool) -> None:
    reservations = new_reservations(num_pages=12)
    run_through(reservations, turn("before", tuple(range(300))))
    held = reservations.reserve(turn("a", tuple(range(700))), 0.0)
    reservations.committed(held.epoch, 3)
    if has_started:
        reservations.started("a")
    reservations.end("a", is_suspect=True)
    reservations.quiesced(held.epoch)
    assert reservations.pages.num_kept == 0 and reservations.pages.num_free == 12
    reservations.check_integrity()


def test_kept_pages_give_way_to_those_in_need() -> None:
    reservations = new_reservations(num_pages=4)
    run_through(reservations, turn("a", tuple(range(700))))
    held = reservations.reserve(turn("b", tuple(range(1, 1000))), 1.0)
    assert len(held.page_ids) == 4 and held.num_kept_pages == 0
    assert reservations.pages.num_kept == 0

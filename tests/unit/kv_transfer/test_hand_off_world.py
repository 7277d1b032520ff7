"""Whatever happens in the world of `tests/support/hand_off_world.py`, its rules hold; and each of ours is needed for that."""

from __future__ import annotations

import pytest

from core.request import Reservation
from decode_worker.reservations import Reservations
from kv_transfer import receiver as rx
from kv_transfer import sender as tx
from tests.support import hand_off_world
from tests.support.hand_off_world import run_world

WORLDS_PER_BLOCK = 150


@pytest.mark.parametrize("block", range(8))
def test_no_write_lands_outside_its_reservation_and_nothing_leaks(block: int) -> None:
    seeds = range(WORLDS_PER_BLOCK * block, WORLDS_PER_BLOCK * (block + 1))
    committed, ends = 0, set[str]()
    for seed in seeds:
        try:
            world = run_world(seed)
        except AssertionError as error:
            raise AssertionError(f"in world {seed}: {error}") from error
        committed += world.num_committed
        ends |= set(world.ended.values())
    assert committed > 2 * WORLDS_PER_BLOCK, "the worlds must do some work"
    assert ends == {"finished", "cancelled", "expired", "sender lost"}, "every way to end must occur"


def breaks(rule: str, num_worlds: int = 3000) -> bool:
    """Whether some world ends with an assertion that says this."""
    for seed in range(num_worlds):
        try:
            run_world(seed)
        except AssertionError as error:
            if rule in str(error):
                return True
    return False


def test_without_quarantine_writes_land_in_foreign_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    true_revoke = rx.Receiver.revoke

    def careless(self: rx.Receiver, epoch: int, now: float) -> list[rx.Action]:
        return [*true_revoke(self, epoch, now), rx.Quiesced(epoch)]

    monkeypatch.setattr(rx.Receiver, "revoke", careless)
    assert breaks("landed in page")


def test_a_quarantine_shorter_than_the_wire_is_too_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hand_off_world, "QUARANTINE_S", 0.2)
    assert breaks("landed in page")


def test_writing_before_the_epoch_is_live_lands_in_foreign_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    true_open = tx.Sender.open

    def hasty(self: tx.Sender, request_id: str, peer: str, reservation: Reservation, now: float) -> list[tx.Action]:
        actions = true_open(self, request_id, peer, reservation, now)
        self._hand_offs[request_id].phase = tx.Phase.SENDING
        return actions

    monkeypatch.setattr(tx.Sender, "open", hasty)
    assert breaks("landed in page")


def test_a_sender_that_does_not_stop_itself_writes_into_foreign_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tx.Sender, "fence", lambda self, now: [])
    assert breaks("landed in page")


def test_without_the_receivers_fence_a_sender_stopped_in_mid_write_corrupts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hand_off_world.World, "fenced", lambda self: None)
    assert breaks("landed in page")


def test_saying_last_write_out_after_a_failed_write_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    true_close = tx.Sender._close

    def talkative(self: tx.Sender, hand_off: tx.HandOff) -> list[tx.Action]:
        said = [tx.LastWriteOut(hand_off.peer, hand_off.reservation.epoch)]
        return said + [action for action in true_close(self, hand_off) if not isinstance(action, tx.LastWriteOut)]

    monkeypatch.setattr(tx.Sender, "_close", talkative)
    assert breaks("may still land")


def test_freeing_local_pages_of_an_aborted_hand_off_at_once_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    true_abort = tx.Sender.abort

    def hurried(self: tx.Sender, request_id: str) -> list[tx.Action]:
        hand_off = self._hand_offs.get(request_id)
        was_busy = hand_off is not None and bool(hand_off.in_flight)
        return [*true_abort(self, request_id), *([tx.Closed(request_id, None)] if was_busy else [])]

    monkeypatch.setattr(tx.Sender, "abort", hurried)
    assert breaks("reads its pages")


def test_without_leases_reservations_leak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Reservations, "expired", lambda self, now: [])
    assert breaks("pages of")


def test_a_commit_before_its_pages_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    true_next = tx.Sender.next_post

    def impatient(self: tx.Sender) -> tx.Post | None:
        for hand_off in self._hand_offs.values():
            if hand_off.phase is tx.Phase.SENDING and hand_off.order is not None and not hand_off.pages and hand_off.in_flight:
                return tx.Post(hand_off.request_id, hand_off.peer, (), hand_off.order, 10)
        return true_next(self)

    monkeypatch.setattr(tx.Sender, "next_post", impatient)
    assert breaks("was committed with pages of")

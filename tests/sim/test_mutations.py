"""Each rule of the hand-off is needed: without it some simulated world breaks, and soon."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from core.errors import BatonError
from decode_worker import reservations
from decode_worker.job import Flight
from decode_worker.reservations import Held, Reservations, State
from engine.scheduler.decode import DecodePlanner
from kv_transfer import receiver as rx
from kv_transfer import sender as tx
from kv_transfer.ending import Answer
from kv_transfer.receiving import KVReceiver
from prefill_worker.job import Job
from prefill_worker.loop import PrefillLoop
from router.session import RankSession
from tests.sim import world
from tests.sim.many import run_many
from tests.sim.null_engine import PAGE_TOKENS

NUM_WORLDS = 10_000

LOOK_FIRST = {"proof that its writes are out": 5600, "waiting for the live answer": 1900}
"""The world to begin with, where it takes many to notice. The others follow."""

Mutate = Callable[[pytest.MonkeyPatch], None]


def drop_quarantine(patch: pytest.MonkeyPatch) -> None:
    """Pages of an aborted reservation are free at once."""
    true_end = Reservations.end

    def end(self: Reservations, request_id: str, *, is_suspect: bool = False) -> Held | None:
        held = true_end(self, request_id, is_suspect=is_suspect)
        if held is not None:
            self.quiesced(held.epoch)
        return held

    patch.setattr(Reservations, "end", end)


def shorten_quarantine(patch: pytest.MonkeyPatch) -> None:
    """The receiver does not wait for a lost sender's last write."""
    true_lost, true_answered = rx.Receiver.sender_lost, rx.Receiver.answered

    def sender_lost(self: rx.Receiver, sender: str, origin: rx.Origin, now: float) -> list[rx.Action]:
        actions = true_lost(self, sender, origin, now - 100.0)
        true_answered(self, sender, True, now - 100.0)
        return actions

    patch.setattr(rx.Receiver, "sender_lost", sender_lost)


def take_silence_for_death(patch: pytest.MonkeyPatch) -> None:
    """A sender whose session broke, and that does not say that it still writes, has ended."""
    patch.setattr(Answer, "is_proof", lambda self, origin: self is not Answer.UNDER_WAY)


def say_over_too_soon(patch: pytest.MonkeyPatch) -> None:
    """A sender that has just learned that a session is over has no write of it under way."""
    patch.setattr(tx.Sender, "is_over", lambda self, peer: True)


def forget_what_is_on_the_wire(patch: pytest.MonkeyPatch) -> None:
    """What a sender wrote just before it said that it is over has landed."""
    true_answered = rx.Receiver.answered
    patch.setattr(rx.Receiver, "answered", lambda self, sender, is_over, now: true_answered(self, sender, is_over, now - 100.0))


def drop_epoch_check(patch: pytest.MonkeyPatch) -> None:
    """A commit counts for whatever holds the reservation by now."""
    patch.setattr(rx.Receiver, "why_void", lambda self, arrived: None if arrived.epoch in self._epochs else "unknown epoch")


def let_anyone_write(patch: pytest.MonkeyPatch) -> None:
    """The receiver tells every sender that its epoch is live, whether it still is or not."""
    true_renew = rx.Receiver.renew

    def renew(self: rx.Receiver, sender: str, epoch: int) -> list[rx.Action]:
        actions = true_renew(self, sender, epoch)
        return [rx.Live(sender, epoch) if isinstance(action, rx.Revoke) else action for action in actions]

    patch.setattr(rx.Receiver, "renew", renew)


def write_before_live(patch: pytest.MonkeyPatch) -> None:
    """A sender does not wait to be told that its epoch is live."""
    true_open = tx.Sender.open

    def open(self: tx.Sender, request_id: str, *arguments: Any) -> list[tx.Action]:
        actions = true_open(self, request_id, *arguments)
        self._hand_offs[request_id].phase = tx.Phase.SENDING
        return actions

    patch.setattr(tx.Sender, "open", open)


def drop_leases(patch: pytest.MonkeyPatch) -> None:
    true_expired = Reservations.expired

    def expired(self: Reservations, now: float) -> list[Any]:
        return [found for found in true_expired(self, now) if now > found.held.deadline]

    patch.setattr(Reservations, "expired", expired)


def drop_fence_of_sender(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(tx.Sender, "fence", lambda self, now: [])


def drop_fence_of_receiver(patch: pytest.MonkeyPatch) -> None:
    true_perform = KVReceiver._perform
    patch.setattr(KVReceiver, "_perform", lambda self, actions: true_perform(self, [a for a in actions if not isinstance(a, rx.Fence)]))


def say_last_write_out_too_soon(patch: pytest.MonkeyPatch) -> None:
    true_close = tx.Sender._close

    def close(self: tx.Sender, hand_off: tx.HandOff) -> list[tx.Action]:
        said: list[tx.Action] = [tx.LastWriteOut(hand_off.peer, hand_off.reservation.epoch)]
        link = self._links[hand_off.peer]
        lost, link.lost = link.lost, None
        actions = true_close(self, hand_off)
        link.lost = lost
        return said + [action for action in actions if not isinstance(action, tx.LastWriteOut)]

    true_abort = tx.Sender.revoked

    def revoked(self: tx.Sender, peer: str, epoch: int) -> list[tx.Action]:
        return [*true_abort(self, peer, epoch), tx.LastWriteOut(peer, epoch)]

    patch.setattr(tx.Sender, "_close", close)
    patch.setattr(tx.Sender, "revoked", revoked)


def commit_before_the_pages(patch: pytest.MonkeyPatch) -> None:
    true_next = tx.Sender.next_post

    def next_post(self: tx.Sender) -> tx.Post | None:
        for hand_off in self._hand_offs.values():
            if hand_off.phase is tx.Phase.SENDING and hand_off.order is not None and not hand_off.pages and hand_off.in_flight:
                return tx.Post(hand_off.request_id, hand_off.peer, (), hand_off.order, 40)
        return true_next(self)

    patch.setattr(tx.Sender, "next_post", next_post)


def free_local_pages_at_once(patch: pytest.MonkeyPatch) -> None:
    """A cancelled prompt's pages are used again while they are read."""
    true_drop = PrefillLoop._drop

    def drop(self: PrefillLoop, job: Job, error: BatonError | None) -> None:
        true_drop(self, job, error)
        self._pages.free(job.request_id)

    patch.setattr(PrefillLoop, "_drop", drop)


def forget_to_cancel(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(RankSession, "cancel", lambda self, request_id: None)


def free_on_commit(patch: pytest.MonkeyPatch) -> None:
    """A reservation that ends between commit and first step is forgotten without being revoked."""
    true_revoke = KVReceiver.revoke

    def revoke(self: KVReceiver, epoch: int) -> None:
        found = self._state._epochs.get(epoch)
        if found is None or found.phase is not rx.Phase.COMMITTED:
            true_revoke(self, epoch)

    patch.setattr(KVReceiver, "revoke", revoke)


def name_pages_by_their_first_token(patch: pytest.MonkeyPatch) -> None:
    def page_digests(ids: Sequence[int]) -> list[bytes]:
        return [bytes(ids[start : start + 1]) for start in range(0, len(ids) - PAGE_TOKENS + 1, PAGE_TOKENS)]

    patch.setattr(reservations, "page_digests", page_digests)


def keep_pages_that_never_came(patch: pytest.MonkeyPatch) -> None:
    """Pages of a reservation that was aborted are taken for filled."""
    true_end = Reservations.end

    def end(self: Reservations, request_id: str, *, is_suspect: bool = False) -> Held | None:
        held = true_end(self, request_id, is_suspect=is_suspect)
        if held is not None and held.epoch in self._quarantined:
            self.pages.holds(f"quarantine/{held.epoch}", held.digests)
        return held

    patch.setattr(Reservations, "end", end)


def give_back_under_a_step(patch: pytest.MonkeyPatch) -> None:
    """Pages of a sequence that ends are free though a step that was launched with it has not ended."""
    patch.setattr(Flight, "holds", lambda self, sequence: False)


def preempt_under_a_step(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(world, "DECODE", dataclasses.replace(world.DECODE, expected_output=0.1))  # so that it happens often
    patch.setattr(DecodePlanner, "has_room", lambda self, *args: True)


MUTATIONS: dict[str, tuple[Mutate, str]] = {
    "quarantine": (drop_quarantine, "landed in"),
    "quarantine of lost senders": (shorten_quarantine, "landed in"),
    "proof that a lost sender has ended": (take_silence_for_death, "landed in"),
    "proof that its writes are out": (say_over_too_soon, "landed in"),
    "bytes on the wire after the proof": (forget_what_is_on_the_wire, "landed in"),
    "epoch check of the commit": (drop_epoch_check, ""),
    "epoch check of the live answer": (let_anyone_write, "landed in"),
    "waiting for the live answer": (write_before_live, "landed in"),
    "lease": (drop_leases, "beyond its lease"),
    "fence of the sender": (drop_fence_of_sender, "has not heard of"),
    "fence of the receiver": (drop_fence_of_receiver, "landed in"),
    "last write out": (say_last_write_out_too_soon, "landed in"),
    "order of the commit": (commit_before_the_pages, ""),
    "local pages": (free_local_pages_at_once, "reads page"),
    "cancel": (forget_to_cancel, ""),
    "names of pages": (name_pages_by_their_first_token, "found foreign bytes"),
    "only filled pages are kept": (keep_pages_that_never_came, "found foreign bytes"),
    "revoke of what is committed": (free_on_commit, "is not idle"),
    "pages of a step under way": (give_back_under_a_step, "not its own any more"),
    "preemption between steps": (preempt_under_a_step, "not its own any more"),
}


@pytest.mark.parametrize("rule", MUTATIONS)
def test_a_world_without_this_rule_breaks(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mutate, says = MUTATIONS[rule]
    mutate(monkeypatch)
    first = LOOK_FIRST.get(rule, 0)
    tally = run_many((*range(first, NUM_WORLDS), *range(first)), stop=lambda broken: says in broken)
    found = {seed: broken for seed, broken in tally.broken.items() if says in broken}
    assert found, f"{NUM_WORLDS} worlds do not notice that the rule is gone"
    print(f"noticed in world {next(iter(found))}: {next(iter(found.values()))}")


def test_states_of_a_reservation_are_those_that_the_checks_know() -> None:
    assert {state.name for state in State} == {"RESERVED", "RECEIVING", "READY", "RUNNING"}

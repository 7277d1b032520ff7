"""Sender, receiver and reservations in one small world: a faulty wire, seeded events, and a page that remembers who wrote it.

The rules that must hold whatever happens: a write lands only in pages of a live reservation of the same request; a committed sequence
has all its pages as its own sender wrote them; every request ends once; nothing leaks.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field

import pytest

from core.errors import Overloaded
from core.request import Member, Request, Reservation, SamplingParams
from decode_worker.reservations import Reservations, State
from kv_transfer import receiver as rx
from kv_transfer import sender as tx

NUM_PAGES, NUM_SLOTS, LEASE_S, QUARANTINE_S = 12, 4, 6.0, 3.0
DECODE = Member(role="decode", replica=0, rank=0, address="d:1", incarnation=77)


@dataclass
class Flying:
    """A write under way: it lands piece by piece, and may land after its sender is dead."""

    sender: str
    request_id: str
    write_id: int
    pages: list[int]
    commit: rx.Arrived | None


@dataclass
class World:
    rng: random.Random
    now: float = 0.0
    reservations: Reservations = field(init=False)
    receiver: rx.Receiver = field(init=False)
    senders: dict[str, tx.Sender] = field(default_factory=dict)
    memory: dict[int, str] = field(default_factory=dict)
    """Page -> request that wrote it last."""
    flying: list[Flying] = field(default_factory=list)
    to_receiver: dict[str, deque[tuple[str, int]]] = field(default_factory=dict)
    to_sender: dict[str, deque[tuple[str, int]]] = field(default_factory=dict)
    wanted: dict[str, list[int]] = field(default_factory=dict)
    ended: dict[str, str] = field(default_factory=dict)
    num_lives: int = 0
    num_requests: int = 0
    num_committed: int = 0

    def __post_init__(self) -> None:
        self.reservations = Reservations(num_pages=NUM_PAGES, num_slots=NUM_SLOTS, lease_s=LEASE_S, expected_output=1.0)
        self.receiver = rx.Receiver(incarnation=DECODE.incarnation, quarantine_s=QUARANTINE_S)
        for _ in range(2):
            self.new_sender()

    # -- events ----------------------------------------------------------------------------------------------------------------

    def new_sender(self) -> None:
        self.num_lives += 1
        name = f"p#{self.num_lives}"
        self.senders[name] = tx.Sender(page_bytes=10, slot_bytes=10, max_bytes_in_flight=30, deadline_s=20.0)
        self.to_receiver[name], self.to_sender[name] = deque(), deque()

    def request(self) -> None:
        self.num_requests += 1
        name, count = f"r{self.num_requests}", self.rng.randint(1, 4)
        tokens = (0,) * (256 * count)
        request = Request(request_id=name, token_ids=tokens, prompt_len=len(tokens), sampling=SamplingParams(max_tokens=1), deadline_s=50)
        try:
            held = self.reservations.reserve(request, self.now)
        except Overloaded:
            return
        self.receiver.expect(held.epoch, name, count, len(tokens))
        if self.rng.random() < 0.9:  # else the order to the prefill rank was lost
            reservation = Reservation(decode=DECODE, epoch=held.epoch, page_ids=held.page_ids, slot_id=held.slot_id, lease_s=LEASE_S)
            sender = self.rng.choice(list(self.senders))
            self.wanted[name] = list(held.page_ids)
            state = self.senders[sender]
            self.act_sender(sender, state.open(name, "d", reservation, self.now))
            cut = self.rng.randint(0, count)
            self.act_sender(sender, state.push(name, 0, range(cut), self.now))
            self.act_sender(sender, state.push(name, cut, range(cut, count), self.now))
            self.act_sender(sender, state.commit(name, tx.CommitOrder(0, len(tokens), 5), self.now))

    def cancel_at_decode(self) -> None:
        held = [name for name in list(self.reservations._held) if self.rng.random() < 0.5]
        for name in held[:1]:
            self.end(name, "cancelled")

    def cancel_at_prefill(self) -> None:
        sender = self.rng.choice(list(self.senders))
        for name in list(self.senders[sender]._hand_offs)[:1]:
            self.act_sender(sender, self.senders[sender].abort(name, self.now))

    def land(self) -> None:
        """One page of some write lands, or its notification, or its sender learns that it is out."""
        if not self.flying:
            return
        write = self.rng.choice(self.flying)
        if write.pages:
            self.write_page(write, write.pages.pop())
            return
        self.flying.remove(write)
        if write.commit is not None:
            self.act_receiver(self.receiver.commit(write.commit))
            if self.rng.random() < 0.1:
                self.act_receiver(self.receiver.commit(write.commit))  # a repeated notification is void
        if write.sender in self.senders:
            self.act_sender(write.sender, self.senders[write.sender].write_finished(write.request_id, write.write_id, True, self.now))

    def write_page(self, write: Flying, page: int) -> None:
        owner = next((o for o in self.reservations.pages.owners() if page in self.reservations.pages.owned_by(o)), None)
        assert owner is not None, f"a write of {write.request_id} landed in free page {page}"
        if not owner.startswith("quarantine/"):
            assert owner == write.request_id, f"a write of {write.request_id} landed in page {page} of {owner}"
        self.memory[page] = write.request_id

    def fail_write(self) -> None:
        """The transport reports a failed write; what had not landed never will."""
        if self.flying:
            write = self.flying.pop(self.rng.randrange(len(self.flying)))
            if write.sender in self.senders:
                self.act_sender(write.sender, self.senders[write.sender].write_finished(write.request_id, write.write_id, False, self.now))

    def deliver(self) -> None:
        name = self.rng.choice(list(self.senders))
        if self.to_receiver[name] and self.rng.random() < 0.5:
            kind, epoch = self.to_receiver[name].popleft()
            known = self.receiver.renew if kind == "renew" else self.receiver.last_write_out
            self.act_receiver(known(name, epoch))
        elif self.to_sender[name]:
            kind, epoch = self.to_sender[name].popleft()
            state = self.senders[name]
            if kind == "released":
                self.act_sender(name, state.released("d", epoch))
            else:
                self.act_sender(name, (state.live if kind == "live" else state.revoked)("d", epoch, self.now))

    def kill_sender(self) -> None:
        """Dead at once; its writes may go on landing for less than the quarantine."""
        name = self.rng.choice(list(self.senders))
        del self.senders[name], self.to_receiver[name], self.to_sender[name]
        for write in self.flying:
            if write.sender == name:
                write.commit = None  # the session broke first, so its commit is void
        self.act_receiver(self.receiver.sender_lost(name, self.now))
        self.flying_until[name] = self.now + QUARANTINE_S * 0.9
        self.new_sender()

    flying_until: dict[str, float] = field(default_factory=dict)

    def finish_running(self) -> None:
        for name, held in list(self.reservations._held.items()):
            if held.state is State.READY:
                self.act_receiver(self.receiver.release(held.epoch))
                self.reservations.started(name)
            elif held.state is State.RUNNING:
                self.end(name, "finished")
                return

    def pass_time(self) -> None:
        self.now += self.rng.choice((0.1, 0.5, 2.0))
        self.flying = [w for w in self.flying if self.now < self.flying_until.get(w.sender, float("inf"))]
        self.act_receiver(self.receiver.tick(self.now))
        for name, state in list(self.senders.items()):
            self.act_sender(name, state.tick(self.now))
        for expired in self.reservations.expired(self.now):
            self.end(expired.held.request.request_id, "expired")

    # -- actions ---------------------------------------------------------------------------------------------------------------

    def end(self, name: str, how: str) -> None:
        held = self.reservations.get(name)
        assert held is not None
        started = held.state is State.RUNNING
        assert name not in self.ended, f"{name} ended twice"
        self.ended[name] = how
        self.reservations.end(name)
        if not started:
            self.act_receiver(self.receiver.revoke(held.epoch, self.now))

    def act_sender(self, name: str, actions: list[tx.Action]) -> None:
        state = self.senders[name]
        for action in actions:
            if isinstance(action, tx.Renew):
                self.to_receiver[name] += [("renew", epoch) for epoch in action.epochs]
            elif isinstance(action, tx.LastWriteOut):
                assert not [w for w in self.flying if w.sender == name and self.epoch_of(w) == action.epoch], "a write is still out"
                self.to_receiver[name].append(("last_write_out", action.epoch))
            elif isinstance(action, tx.Post):
                hand_off = state.hand_off(action.request_id)
                assert hand_off is not None
                write_id = self.rng.getrandbits(60)
                commit = None
                if action.order is not None:
                    commit = rx.Arrived(
                        epoch=hand_off.reservation.epoch,
                        receiver_incarnation=DECODE.incarnation,
                        sender=name,
                        request_id=action.request_id,
                        num_tokens=action.order.num_tokens,
                        num_pages=len(hand_off.all_pages),
                        first_token=5,
                    )
                write = Flying(name, action.request_id, write_id, [remote for _, remote in action.pages], commit)
                self.flying.append(write)
                state.posted(action.request_id, write_id, 10)

    def epoch_of(self, write: Flying) -> int:
        hand_off = self.senders[write.sender].hand_off(write.request_id)
        return hand_off.reservation.epoch if hand_off else -1

    def act_receiver(self, actions: list[rx.Action]) -> None:
        for action in actions:
            if isinstance(action, (rx.Live, rx.Revoke, rx.Release)):
                if action.sender in self.to_sender:
                    kind = {rx.Live: "live", rx.Revoke: "revoked", rx.Release: "released"}[type(action)]
                    self.to_sender[action.sender].append((kind, action.epoch))
            elif isinstance(action, rx.Renewed):
                self.reservations.renewed(action.epoch, self.now)
            elif isinstance(action, rx.Quiesced):
                self.reservations.quiesced(action.epoch)
            elif isinstance(action, rx.SenderLost):
                held = self.reservations.of_epoch(action.epoch)
                if held is not None:
                    self.end(held.request.request_id, "sender lost")
            elif isinstance(action, rx.Committed):
                held = self.reservations.committed(action.epoch, action.first_token)
                if held is None:
                    self.act_receiver(self.receiver.revoke(action.epoch, self.now))
                else:
                    self.num_committed += 1
                    written = {self.memory.get(page) for page in held.page_ids}
                    assert written == {held.request.request_id}, f"{held.request.request_id} was committed with pages of {written}"

    def step(self) -> None:
        events = (
            (self.request, 4),
            (self.land, 12),
            (self.deliver, 12),
            (self.finish_running, 3),
            (self.pass_time, 3),
            (self.cancel_at_decode, 0.5),
            (self.cancel_at_prefill, 0.5),
            (self.fail_write, 0.3),
            (self.kill_sender, 0.2),
        )
        self.rng.choices([event for event, _ in events], [weight for _, weight in events])[0]()
        self.reservations.check_integrity()

    def settle(self) -> None:
        """No new requests; everything must come to an end by itself."""
        for _ in range(3000):
            self.rng.choice((self.land, self.deliver, self.finish_running, self.pass_time))()
            if not self.reservations.num_held and not self.reservations.num_quarantined and not self.flying:
                break
        assert self.reservations.pages.num_free == NUM_PAGES, f"{self.reservations.pages.owners()}"
        assert self.reservations.slots.num_free == NUM_SLOTS


def run_world(seed: int, num_events: int = 250) -> World:
    world = World(random.Random(seed))
    for _ in range(num_events):
        world.step()
    world.settle()
    return world


@pytest.mark.parametrize("block", range(8))
def test_no_write_lands_outside_its_reservation_and_nothing_leaks(block: int) -> None:
    committed = sum(run_world(seed).num_committed for seed in range(100 * block, 100 * (block + 1)))
    assert committed > 500, "the worlds must do some work"


def breaks_within(num_worlds: int) -> bool:
    for seed in range(num_worlds):
        try:
            run_world(seed)
        except AssertionError:
            return True
    return False


def test_without_quarantine_the_world_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    true_revoke = rx.Receiver.revoke

    def careless(self: rx.Receiver, epoch: int, now: float) -> list[rx.Action]:
        actions = true_revoke(self, epoch, now)
        return [*actions, rx.Quiesced(epoch)]

    monkeypatch.setattr(rx.Receiver, "revoke", careless)
    assert breaks_within(300)


def test_writing_before_the_epoch_is_live_breaks_the_world(monkeypatch: pytest.MonkeyPatch) -> None:
    true_open = tx.Sender.open

    def hasty(self: tx.Sender, request_id: str, peer: str, reservation: Reservation, now: float) -> list[tx.Action]:
        actions = true_open(self, request_id, peer, reservation, now)
        self._hand_offs[request_id].phase = tx.Phase.SENDING
        return actions

    monkeypatch.setattr(tx.Sender, "open", hasty)
    assert breaks_within(300)


def test_without_leases_reservations_leak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Reservations, "expired", lambda self, now: [])
    assert breaks_within(300)


def test_a_commit_before_its_pages_breaks_the_world(monkeypatch: pytest.MonkeyPatch) -> None:
    true_pump = tx.Sender._pump

    def impatient(self: tx.Sender, now: float) -> list[tx.Action]:
        actions = true_pump(self, now)
        for hand_off in self._hand_offs.values():
            if hand_off.phase is tx.Phase.SENDING and hand_off.order is not None and not hand_off.pages:
                hand_off.phase = tx.Phase.COMMITTING
                actions.append(tx.Post(hand_off.request_id, hand_off.peer, (), hand_off.order))
        return actions

    monkeypatch.setattr(tx.Sender, "_pump", impatient)
    assert breaks_within(300)

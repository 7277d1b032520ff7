"""Senders, a receiver and its reservations in one small world: a faulty wire, processes that die or stand still, seeded events.

What the wire does is what NIXL over UCX was seen to do: bytes move only while the writer polls; failed writes may land later; only a
reset, on either side, keeps what is not yet on the wire from landing; what is on the wire lands within WIRE_S, whatever happens.

What must hold whatever happens is asserted on every event: a write lands only in pages that are its reservation's, a committed sequence
has all its pages as its own sender wrote them, every request and every hand-off ends once, local pages are not given free while
they are read from, and nothing leaks.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field

from core.errors import Overloaded, TransferFailed
from core.request import Member, Request, Reservation, SamplingParams
from decode_worker.reservations import Reservations, State
from kv_transfer import receiver as rx
from kv_transfer import sender as tx

NUM_PAGES, NUM_SLOTS, LEASE_S = 12, 4, 6.0
LIVENESS_S, DRAIN_S, WIRE_S, QUARANTINE_S = 2.0, 1.0, 0.8, 4.0
LIMITS = tx.Limits(
    page_bytes=10,
    slot_bytes=10,
    max_bytes_in_flight=40,
    deadline_s=20.0,
    write_timeout_s=5.0,
    liveness_timeout_s=LIVENESS_S,
    drain_s=DRAIN_S,
)
DECODE = Member(role="decode", replica=0, rank=0, address="d:1", incarnation=77)


@dataclass(eq=False)
class Flying:
    """A write under way. It lands piece by piece while its writer polls, or, once all of it is on the wire, by itself."""

    process: Process
    request_id: str
    epoch: int
    write_id: int
    pages: list[int]
    commit: rx.Arrived | None
    wire_until: float | None = None
    """Set when the writer sends no more of it: what has not landed by then never will."""
    hangs: bool = False


@dataclass(eq=False)
class Link:
    """A session. Messages are lost with it."""

    name: str
    to_receiver: deque[tuple[str, int]] = field(default_factory=deque)
    to_sender: deque[tuple[str, float]] = field(default_factory=deque)
    is_open: bool = True
    heard_at: float = 0.0


@dataclass(eq=False)
class Process:
    """A prefill rank. While it is stopped nothing in it runs, not even its clock checks."""

    name: str
    sender: tx.Sender = field(default_factory=lambda: tx.Sender(LIMITS))
    link: Link | None = None
    runs_again_at: float = 0.0
    ran_at: float = 0.0
    resumes_carelessly: bool = False
    """It was stopped inside the transport, and goes on writing there before anything else."""


class World:
    def __init__(self, seed: int) -> None:
        self.rng, self.now = random.Random(seed), 0.0
        self.reservations = Reservations(num_pages=NUM_PAGES, num_slots=NUM_SLOTS, lease_s=LEASE_S, expected_output=1.0)
        self.receiver = rx.Receiver(incarnation=DECODE.incarnation, quarantine_s=QUARANTINE_S, answer_s=10.0)
        self.memory: dict[int, str] = {}
        """Page -> request that wrote it last."""
        self.flying: list[Flying] = []
        self.links: dict[str, Link] = {}
        """Open sessions by the receiver's name for them."""
        self.processes: list[Process] = []
        self.ended: dict[str, str] = {}
        self.opened: set[str] = set()
        self.closed: set[str] = set()
        self.num_names = self.num_committed = 0
        for _ in range(2):
            self.new_process()

    def name(self, prefix: str) -> str:
        self.num_names += 1
        return f"{prefix}{self.num_names}"

    # -- events ----------------------------------------------------------------------------------------------------------------

    def new_process(self) -> None:
        self.processes.append(Process(self.name("p")))

    def running(self) -> list[Process]:
        return [process for process in self.processes if self.now >= process.runs_again_at]

    def request(self) -> None:
        name, count = self.name("r"), self.rng.randint(1, 4)
        tokens = (0,) * (256 * count)
        request = Request(request_id=name, token_ids=tokens, prompt_len=len(tokens), sampling=SamplingParams(max_tokens=1), deadline_s=50)
        try:
            held = self.reservations.reserve(request, self.now)
        except Overloaded:
            return
        self.receiver.expect(held.epoch, name, count, len(tokens))
        if self.rng.random() < 0.1 or not self.running():
            return  # the order to the prefill rank was lost
        process = self.rng.choice(self.running())
        reservation = Reservation(
            request_id=name, decode=DECODE, epoch=held.epoch, page_ids=held.page_ids, slot_id=held.slot_id, lease_s=LEASE_S
        )
        state = process.sender
        self.check_fence(process)
        if process.link is None:
            process.link = Link(self.name(process.name + "/"), heard_at=self.now)
            self.links[process.link.name] = process.link
        link = process.link.name
        if link in state._links and not state.is_usable(link):
            return  # being torn down
        self.opened.add(name)
        self.act_sender(process, state.open(name, link, reservation, self.now))
        cut = self.rng.randint(0, count)
        state.push(name, 0, range(cut))
        if self.rng.random() < 0.95:  # else prefill never finishes
            state.push(name, cut, range(cut, count))
            state.commit(name, tx.CommitOrder(0, len(tokens), 5), self.now)
        self.post(process)

    def cancel_at_decode(self) -> None:
        for name in [name for name in list(self.reservations._held) if self.rng.random() < 0.5][:1]:
            self.end(name, "cancelled")

    def cancel_at_prefill(self) -> None:
        for process in self.running()[:1]:
            for name in list(process.sender._hand_offs)[:1]:
                self.act_sender(process, process.sender.abort(name))

    def land(self) -> None:
        """One page of some write lands, or its notification, or its writer learns that it is out."""
        if not self.flying:
            return
        write = self.rng.choice(self.flying)
        if write.wire_until is None:
            if self.now < write.process.runs_again_at or write.hangs:
                return
            self.check_fence(write.process)
            if write not in self.flying:
                return
        if write.pages:
            self.write_page(write, write.pages.pop())
            return
        self.flying.remove(write)
        if write.wire_until is not None:
            return
        if write.commit is not None:
            self.commit(write.commit)
            if self.rng.random() < 0.1:
                self.commit(write.commit)  # a repeated notification is void
        process = write.process
        self.act_sender(process, process.sender.write_finished(write.request_id, write.write_id, True, self.now))
        self.post(process)

    def write_page(self, write: Flying, page: int) -> None:
        owner = next((o for o in self.reservations.pages.owners() if page in self.reservations.pages.owned_by(o)), None)
        mine = (write.request_id, f"quarantine/{write.epoch}")
        assert owner in mine, f"a write of {write.request_id} landed in page {page} of {owner or 'nobody'}"
        held = self.reservations.get(write.request_id)
        assert held is None or held.state is not State.RUNNING, f"a write of {write.request_id} landed while it ran"
        self.memory[page] = write.request_id

    def fail_write(self) -> None:
        """The transport reports a failed write. Part of it is still on the wire."""
        for write in [w for w in self.flying if w.wire_until is None and self.now >= w.process.runs_again_at][:1]:
            self.check_fence(write.process)
            if write not in self.flying:
                return
            self.to_wire(write)
            process = write.process
            self.act_sender(process, process.sender.write_finished(write.request_id, write.write_id, False, self.now))
            self.post(process)

    def hang_write(self) -> None:
        for write in [w for w in self.flying if w.wire_until is None][:1]:
            write.hangs = True

    def to_wire(self, write: Flying) -> None:
        """It is given up; what was sent while its process ran is still on the way."""
        write.wire_until, write.commit = write.process.ran_at + WIRE_S, None
        self.lose_expired()

    def lose_expired(self) -> None:
        self.flying = [write for write in self.flying if write.wire_until is None or self.now < write.wire_until]

    def stop_sending(self, process: Process) -> None:
        for write in list(self.flying):
            if write.process is process and write.wire_until is None:
                self.to_wire(write)

    def deliver(self) -> None:
        running = [process for process in self.running() if process.link is not None]
        if not running:
            return
        process = self.rng.choice(running)
        link, state = process.link, process.sender
        assert link is not None
        if link.to_receiver and link.name not in self.links:
            link.to_receiver.clear()  # the receiver listens no more
        elif link.to_receiver and self.rng.random() < 0.5:
            kind, value = link.to_receiver.popleft()
            link.heard_at = self.now
            if kind == "ping":
                link.to_sender.append(("pong", value / 1000))
            else:
                self.act_receiver((self.receiver.renew if kind == "renew" else self.receiver.last_write_out)(link.name, value))
        elif link.to_sender:
            kind, what = link.to_sender.popleft()
            if kind == "pong":
                state.vouched(link.name, what)
            elif kind == "live":
                state.live(link.name, int(what))
            elif kind == "released":
                self.act_sender(process, state.released(link.name, int(what), self.now))
            else:
                self.act_sender(process, state.revoked(link.name, int(what)))
            self.check_fence(process)
            self.post(process)

    def kill_process(self) -> None:
        process = self.rng.choice(self.processes)
        self.processes.remove(process)
        self.opened -= set(process.sender._hand_offs)
        self.stop_sending(process)
        self.receiver_loses(process.link)
        self.new_process()

    def stop_process(self) -> None:
        for process in self.running()[:1]:
            process.runs_again_at = self.now + self.rng.choice((1.0, 3.0, 5.0, 9.0))
            had_faults = any(link.lost for link in process.sender._links.values()) or not (process.link and process.link.is_open)
            # Not both at once: see Limits in kv_transfer/README.md.
            process.resumes_carelessly = not had_faults and self.rng.random() < 0.3

    def cut_link(self) -> None:
        """The session breaks; what each side makes of it is its own business."""
        link = self.rng.choice(list(self.links.values())) if self.links else None
        if link is not None:
            link.is_open = False

    def finish_running(self) -> None:
        for name, held in list(self.reservations._held.items()):
            if held.state is State.READY:
                self.act_receiver(self.receiver.release(held.epoch))
                self.reservations.started(name)
            elif held.state is State.RUNNING:
                self.end(name, "finished")
                return

    def pass_time(self) -> None:
        self.now += self.rng.choice((0.1, 0.2, 0.5))
        self.lose_expired()
        for process in self.running():
            self.resume(process)
            self.run_process(process)
        for link in list(self.links.values()):
            if self.now - link.heard_at > LIVENESS_S:
                self.receiver_loses(link)
        self.act_receiver(self.receiver.tick(self.now))
        for expired in self.reservations.expired(self.now):
            self.end(expired.held.request.request_id, "expired")

    def resume(self, process: Process) -> None:
        if process.resumes_carelessly:
            process.resumes_carelessly = False
            for write in [w for w in self.flying if w.process is process and w.wire_until is None]:
                for page in list(write.pages):
                    write.pages.remove(page)
                    self.write_page(write, page)

    def run_process(self, process: Process) -> None:
        self.check_fence(process)
        link = process.link
        if link is not None and not link.is_open and self.rng.random() < 0.5:  # the news takes its time
            process.link = None
            self.act_sender(process, process.sender.peer_lost(link.name, TransferFailed("cut")))
            self.receiver_loses(link)
        process.ran_at = self.now
        self.act_sender(process, process.sender.tick(self.now))
        if process.link is not None:
            process.link.to_receiver.append(("ping", round(self.now * 1000)))
        self.post(process)

    # -- actions ---------------------------------------------------------------------------------------------------------------

    def check_fence(self, process: Process) -> None:
        """As the edge does before it uses the transport."""
        self.act_sender(process, process.sender.fence(self.now))

    def post(self, process: Process) -> None:
        self.check_fence(process)
        while (post := process.sender.next_post()) is not None:
            hand_off = process.sender.hand_off(post.request_id)
            assert hand_off is not None
            link = process.link
            assert link is not None and post.peer == link.name, f"{post} over a lost link"
            write_id, commit = self.rng.getrandbits(60), None
            if post.order is not None:
                commit = rx.Arrived(
                    epoch=hand_off.reservation.epoch,
                    receiver_incarnation=DECODE.incarnation,
                    sender=link.name,
                    request_id=post.request_id,
                    num_tokens=post.order.num_tokens,
                    num_pages=len(hand_off.all_pages),
                    first_token=post.order.first_token,
                )
            pages = [remote for _, remote in post.pages]
            self.flying.append(Flying(process, post.request_id, hand_off.reservation.epoch, write_id, pages, commit))
            process.sender.posted(post, write_id, self.now)
            assert process.sender.bytes_in_flight <= LIMITS.max_bytes_in_flight + LIMITS.slot_bytes, "too much in flight"

    def act_sender(self, process: Process, actions: list[tx.Action]) -> None:
        for action in actions:
            if isinstance(action, tx.Renew):
                if process.link is not None and process.link.name == action.peer:
                    process.link.to_receiver += [("renew", epoch) for epoch in action.epochs]
            elif isinstance(action, tx.LastWriteOut):
                late = [w for w in self.flying if w.epoch == action.epoch]
                assert not late, f"{action} while {late} may still land"
                if process.link is not None and process.link.name == action.peer:
                    process.link.to_receiver.append(("last_write_out", action.epoch))
            elif isinstance(action, tx.Drop):
                assert not any(w.process is process and w.wire_until is None for w in self.flying if self.is_over(w, action.peer))
                if process.link is not None and process.link.name == action.peer:
                    link, process.link = process.link, None
                    self.receiver_loses(link)
            elif isinstance(action, tx.Reset):
                self.stop_sending(process)
                self.act_sender(process, process.sender.was_reset())
            elif isinstance(action, tx.Closed):
                assert action.request_id not in self.closed, f"{action.request_id} closed twice"
                self.closed.add(action.request_id)
                reading = [w for w in self.flying if w.request_id == action.request_id and w.wire_until is None]
                assert not reading, f"{action} while {reading} reads its pages"

    def is_over(self, write: Flying, link: str) -> bool:
        hand_off = write.process.sender.hand_off(write.request_id)
        return hand_off is not None and hand_off.peer == link

    def receiver_loses(self, link: Link | None) -> None:
        if link is None or self.links.pop(link.name, None) is None:
            return
        link.is_open = False
        link.to_receiver.clear()
        was_silent = self.now - link.heard_at > 1.0
        self.act_receiver(self.receiver.sender_lost(link.name, self.now, was_silent=was_silent))

    def commit(self, arrived: rx.Arrived) -> None:
        if arrived.sender in self.links:
            self.act_receiver(self.receiver.commit(arrived))

    def act_receiver(self, actions: list[rx.Action]) -> None:
        for action in actions:
            if isinstance(action, (rx.Live, rx.Revoke, rx.Release)):
                link = self.links.get(action.sender)
                if link is not None:
                    kind = {rx.Live: "live", rx.Revoke: "revoked", rx.Release: "released"}[type(action)]
                    link.to_sender.append((kind, action.epoch))
            elif isinstance(action, rx.HangUp):
                self.receiver_loses(self.links.get(action.sender))
            elif isinstance(action, rx.Fence):
                self.fenced()
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
                assert held is not None, "one thread: nothing comes between"
                self.num_committed += 1
                written = {self.memory.get(page) for page in held.page_ids}
                assert written == {held.request.request_id}, f"{held.request.request_id} was committed with pages of {written}"

    def fenced(self) -> None:
        """Nothing of old connections lands; their writers see failed writes when they run."""
        for write in list(self.flying):
            write.pages.clear()
            self.to_wire(write)
        for process in self.processes:
            for hand_off in list(process.sender._hand_offs.values()):
                for write_id in list(hand_off.in_flight):
                    self.act_sender(process, process.sender.write_finished(hand_off.request_id, write_id, False, self.now))
        for link in list(self.links.values()):
            self.receiver_loses(link)

    def end(self, name: str, how: str) -> None:
        held = self.reservations.get(name)
        assert held is not None
        assert name not in self.ended, f"{name} ended twice"
        self.ended[name] = how
        has_started = held.state is State.RUNNING
        self.reservations.end(name)
        if not has_started:
            self.act_receiver(self.receiver.revoke(held.epoch, self.now))

    # -- running ---------------------------------------------------------------------------------------------------------------

    EVENTS = (
        (request, 4.0),
        (land, 12.0),
        (deliver, 16.0),
        (finish_running, 3.0),
        (pass_time, 4.0),
        (cancel_at_decode, 0.5),
        (cancel_at_prefill, 0.5),
        (fail_write, 0.3),
        (hang_write, 0.2),
        (cut_link, 0.2),
        (stop_process, 0.3),
        (kill_process, 0.1),
    )

    def step(self) -> None:
        events, weights = zip(*self.EVENTS, strict=True)
        self.rng.choices(events, weights)[0](self)
        self.reservations.check_integrity()

    def settle(self) -> None:
        """Nothing new happens; everything must come to an end by itself."""
        for _ in range(8000):
            self.rng.choice((self.land, self.deliver, self.deliver, self.finish_running, self.pass_time))()
            if self.is_over_all():
                break
        assert self.reservations.pages.num_free == NUM_PAGES, f"pages of {self.reservations.pages.owners()}"
        assert self.reservations.slots.num_free == NUM_SLOTS
        assert not self.receiver.num_open, f"the receiver still knows {self.receiver._epochs}"
        assert self.closed >= self.opened, f"{sorted(self.opened - self.closed)} never closed"

    def is_over_all(self) -> bool:
        return not (
            self.reservations.num_held or self.reservations.num_quarantined or self.flying or any(p.sender.num_open for p in self.processes)
        )


def run_world(seed: int, num_events: int = 300) -> World:
    """One history. Raises AssertionError, which names the broken rule."""
    world = World(seed)
    for _ in range(num_events):
        world.step()
    world.settle()
    return world

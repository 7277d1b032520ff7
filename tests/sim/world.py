"""A world: a few routers and ranks running the real decision code, clients, and what goes wrong. All of it follows from a seed.

What must hold, whatever happens:

* every request ends once, with exactly the tokens that an undisturbed run gives, with an error that says that the world was at fault, or
  by its client's own wish; what was streamed before is a beginning of the right tokens;
* a page has one owner; a write lands only where its reservation still is; nobody reads local pages that are given free; nobody writes to a
  receiver that it has not heard of for longer than the quarantine allows for;
* when all is over nothing is left: no page, no slot, no job, no epoch, no hand-off, no write, no task of a request.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

from core.request import Member
from decode_worker.config import DecodeConfig
from prefill_worker.config import PrefillConfig
from tests.sim.client import Client
from tests.sim.network import Link, Network, Process
from tests.sim.ranks import DecodeRank, PrefillRank, Rank, RouterProcess
from tests.sim.threads import SimThread
from tests.sim.wire import Wire

PREFILL = PrefillConfig(num_pages=7, num_slots=3, chunk_tokens=8, max_waiting=6)
DECODE = DecodeConfig(num_pages=12, num_slots=4, max_running=3, expected_output=0.6)


class World(Network):
    def __init__(self, seed: int, tell: Callable[[str], None] | None = None, set_up: Callable[[World], None] | None = None) -> None:
        """`tell` gets the transcript, a line at a time. `set_up` makes the cluster and plans what happens; without it both follow from
        the seed."""
        super().__init__(seed)
        self._make = set_up or World.set_up
        self.seed, self._tell = seed, tell
        self.decode_overlaps = seed % 2 == 0
        """Whether decode steps are launched ahead of the tokens of those before them."""
        self.wire = Wire(self)
        self.ranks: dict[str, Rank] = {}
        """By address: who lives there, or lived there last."""
        self.listed: dict[str, Member] = {}
        """By address: what the controller tells the routers."""
        self.routers: list[RouterProcess] = []
        self.clients: list[Client] = []
        self.faults: list[str] = []
        self.num_kept_pages = 0
        """Pages that were not sent because the decode rank had them."""
        self.request_numbers = itertools.count(1)
        self._numbers = itertools.count(1)
        self._end_of_events = 0.0
        self._awaited: list[tuple[str, Callable[[], None]]] = []

    @property
    def has_transcript(self) -> bool:
        return self._tell is not None

    # -- what the parts ask ------------------------------------------------------------------------------------------------------

    def note(self, who: Process | None, text: str) -> None:
        if self._tell is not None:
            for fragment, event in [found for found in self._awaited if found[0] in text]:
                self._awaited.remove((fragment, event))
                self.loop.at(self.loop._now, event)
            self._tell(f"{self.loop._now:8.3f}  {who.name if who is not None else '':<12} {text}")

    def when(self, fragment: str, event: Callable[[], None]) -> None:
        """Let it happen as soon as a line of the transcript contains this, once."""
        self._awaited.append((fragment, event))

    def at_address(self, address: str) -> Rank | None:
        found = self.ranks.get(address)
        return found if found is not None and found.is_alive else None

    def is_cut_off(self, process: Process, member: Member) -> bool:
        other = self.ranks.get(member.address)
        return other is not None and self.is_cut(process, other)

    # -- the cluster -------------------------------------------------------------------------------------------------------------

    def start_rank(self, role: str, replica: int) -> None:
        address = f"{role}:{replica}"
        number = next(self._numbers)
        before = self.ranks.get(address)
        incarnation = 1000 * number + (before.member.incarnation % 10 + 1 if before is not None else 0)
        rank: Rank
        if role == "prefill":
            rank = PrefillRank(self, replica, address, incarnation, PREFILL)
        else:
            rank = DecodeRank(self, replica, address, incarnation, DECODE)
        self.ranks[address] = rank
        self.listed[address] = rank.member
        self.loop.create_task(rank.start())

    def announce(self) -> None:
        for one in self.routers:
            one.later(0.01 + 0.05 * self.rng.random(), functools.partial(self._tell_members, one))

    def _tell_members(self, one: RouterProcess) -> None:
        one.update(list(self.listed.values()))

    def living(self, role: str = "") -> list[Rank]:
        return [rank for rank in self.ranks.values() if rank.is_alive and rank.member.role.startswith(role)]

    def staying(self, role: str) -> list[Rank]:
        return [rank for rank in self.living(role) if not rank.is_draining]

    def make_cluster(self, num_prefill: int, num_decode: int, num_routers: int) -> None:
        for role, count in (("prefill", num_prefill), ("decode", num_decode)):
            for replica in range(count):
                self.start_rank(role, replica)
        for number in range(num_routers):
            one = RouterProcess(self, f"router{number}", self.times.router)
            self.routers.append(one)
            one.update(list(self.listed.values()))

    def set_up(self) -> None:
        rng = self.rng
        self.make_cluster(rng.choice((1, 2, 2)), rng.choice((1, 2, 2, 3)), rng.choice((1, 1, 2)))
        count = 14 if rng.random() < 0.03 else rng.choice((1, 2, 2, 3, 4))  # 14 are more than a router takes
        span = rng.choice((0.05, 0.3, 0.8))
        for number in range(count):
            client = Client(self, number)
            self.clients.append(client)
            self.plan(0.05 + span * rng.random(), functools.partial(self.ask, client))
        events, weights = zip(*self.EVENTS, strict=True)
        for event in rng.choices(events, weights, k=rng.choice((0, 1, 1, 2, 2, 3, 4))):
            when = 0.05 + rng.choice((0.2, 0.4, 0.4, 1.5)) * rng.random()
            self.plan(when, functools.partial(event, self))
        if rng.random() < 0.3:
            self.wire.repeats = 0.3
        if rng.random() < 0.05:
            self.wire.loses, self.faults = 0.3, [*self.faults, "loses"]
        if rng.random() < 0.15:
            self.wire.fails, self.faults = 0.15, [*self.faults, "fails"]

    def plan(self, when: float, event: Callable[[], None]) -> None:
        self._end_of_events = max(self._end_of_events, when)
        self.loop.at(when, event)

    def ask(self, client: Client) -> None:
        running = [one for one in self.routers if one.is_alive]
        if not running:
            client.outcome = "refused"
            return
        client.start(self.rng.choice(running))

    # -- what goes wrong ---------------------------------------------------------------------------------------------------------

    def _fault(self, who: Process | None, text: str) -> None:
        self.faults.append(text.split(" ")[0])
        self.note(who, f"*** {text}")

    def kill_rank(self) -> None:
        found = self.living()
        if found:
            rank = self.rng.choice(found)
            self.kill(rank, self.rng.random() < 0.8 or self.staying(rank.member.role) == [rank])

    def kill(self, rank: Rank, is_replaced: bool) -> None:
        """The controller notices, tells, and starts it again at the same address."""
        self._fault(rank, "killed")
        rank.kill()
        address = rank.member.address
        self.loop.at(self.loop._now + 0.3 * self.rng.random(), functools.partial(self._strike, address, rank.member))
        if is_replaced or not self.staying(rank.member.role):
            self.plan(self.loop._now + 0.05 + 0.6 * self.rng.random(), functools.partial(self._start_again, rank))

    def _strike(self, address: str, member: Member) -> None:
        if self.listed.get(address) is member:
            del self.listed[address]
            self.announce()

    def _start_again(self, rank: Rank) -> None:
        if self.ranks.get(rank.member.address) is rank:
            self.start_rank(rank.member.role, rank.member.replica)
            self.note(self.ranks[rank.member.address], "starts at the address of the one before")
            self.announce()

    def kill_router(self) -> None:
        one = self.rng.choice(self.routers)
        if not one.is_alive:
            return
        self._fault(one, "killed")
        one.kill()
        for session in one.members._sessions.values():
            session.is_connected = False
            session._task.cancel()
        for client in self.clients:
            if client.task is not None and client.router is one:
                client.task.cancel()

    def stop_rank(self) -> None:
        found = [rank for rank in self.living() if rank.is_running]
        if not found:
            return
        rank = self.rng.choice(found)
        seconds = self.rng.choice((0.2, 0.7, 1.4, 3.0, 6.0)) * (0.8 + 0.4 * self.rng.random())
        self._fault(rank, f"stopped for {seconds:.1f} s")
        rank.stop(seconds)
        if isinstance(rank, PrefillRank) and self.rng.random() < 0.4:
            self.loop.at(rank.stopped_until, self._resume_carelessly, rank)

    def _resume_carelessly(self, rank: PrefillRank) -> None:
        """It was stopped inside the transport, and goes on there before anything else."""
        if rank.is_alive:
            self.note(rank, "goes on in the middle of its writes")
            rank.transport.advance(is_careless=True)

    def break_in_mid_write(self) -> None:
        """The next write that is under way: its session is reset, and its sender is stopped before or soon after it has learned of it."""
        self._look_for_a_write(self.loop._now + 1.0)

    def _look_for_a_write(self, until: float) -> None:
        for flight in self.wire.flights:
            for link in self.links:
                rank, other = (end.process for end in link.ends)
                if flight.pieces and rank is flight.source and other is flight.target.host and rank.is_running and other.is_running:
                    self.break_off(link, self.rng.choice((0.0, 0.02)), self.rng.choice((2.4, 2.4, 6.0)) * (0.9 + 0.2 * self.rng.random()))
                    return
        if self.loop._now < until:
            self.loop.at(self.loop._now + 0.01, self._look_for_a_write, until)

    def break_off(self, link: Link, delay: float, seconds: float) -> None:
        """The one that began the session is stopped, so long after the reset, and goes on in the midst of its writes."""
        rank = link.ends[0].process
        assert isinstance(rank, PrefillRank)
        self._fault(rank, f"broken off from {link.ends[1].process.name}, stopped for {seconds:.1f} s")
        link.reset()
        self.loop.at(self.loop._now + delay, self._stop_in_mid_write, rank, seconds)

    def _stop_in_mid_write(self, rank: PrefillRank, seconds: float) -> None:
        rank.stop(seconds)
        self.loop.at(rank.stopped_until, self._resume_carelessly, rank)

    def cut_network(self) -> None:
        processes: list[Process] = [*self.living(), *(one for one in self.routers if one.is_alive)]
        a, b = self.rng.sample(processes, 2) if len(processes) > 1 else (None, None)
        if a is None or b is None:
            return
        self.cut(a, b, self.rng.choice((0.3, 1.0, 2.0, 5.0)) * (0.8 + 0.4 * self.rng.random()))

    def cut(self, a: Process, b: Process, seconds: float) -> None:
        self._fault(a, f"cut off from {b.name} for {seconds:.1f} s")
        super().cut(a, b, seconds)

    def reset_link(self) -> None:
        found = [link for link in self.links if all(end.process.is_running for end in link.ends)]
        if found:
            link = self.rng.choice(found)
            self._fault(link.ends[0].process, f"connection to {link.ends[1].process.name} reset")
            link.reset()

    def hang_write(self) -> None:
        for flight in self.wire.flights[:1]:
            self._fault(flight.target.host, f"write of {flight.write.tag.request_id} hangs")
            flight.hangs = True

    def stall_sender(self) -> None:
        """Its thread hangs in a call; everything else of the process goes on, pings too."""
        found = [rank for rank in self.living("prefill") if isinstance(rank, PrefillRank)]
        if found:
            rank = self.rng.choice(found)
            seconds = self.rng.choice((1.0, 5.0, 20.0))
            self._fault(rank, f"stalls in its sender for {seconds:.0f} s")
            rank.sender._thread._busy_until = self.loop._now + seconds  # type: ignore[attr-defined]

    def cancel(self) -> None:
        running = [client for client in self.clients if client.task is not None and not client.outcome]
        for client in running if self.rng.random() < 0.4 else running[:1]:
            self.note(None, f"{client.name} leaves")
            assert client.task is not None
            client.task.cancel()

    def scale_up(self) -> None:
        role = self.rng.choice(("prefill", "decode"))
        self.start_rank(role, 5 + next(self._numbers))
        self.announce()
        self.note(None, f"one more {role} rank")

    def scale_down(self) -> None:
        role = self.rng.choice(("prefill", "decode"))
        found = self.staying(role)
        if len(found) > 1:
            rank = self.rng.choice(found)
            self.note(rank, "drains")
            rank.is_draining = True
            rank.engine.is_draining = True  # type: ignore[attr-defined]
            self.faults.append("drained")
            self._end_when_idle(rank, self.loop._now + 5.0)

    def _end_when_idle(self, rank: Rank, deadline: float) -> None:
        if not rank.is_alive:
            return
        if rank.is_idle or self.loop._now > deadline:
            self.note(rank, f"ends, {'idle' if rank.is_idle else 'at its deadline'}")
            rank.kill()
            self._strike(rank.member.address, rank.member)
        else:
            self.loop.at(self.loop._now + 0.2, lambda: self._end_when_idle(rank, deadline))

    def jump_clock(self) -> None:
        processes: list[Process] = [*self.living(), *(one for one in self.routers if one.is_alive)]
        if processes:
            process = self.rng.choice(processes)
            # A receiver's clock may not run ahead by more than the quarantine is longer than it must be.
            seconds = self.rng.random() * (0.2 if isinstance(process, DecodeRank) else 3.0)
            self._fault(process, f"clock jumps ahead by {seconds:.1f} s")
            process.jump(seconds)

    EVENTS = (
        (kill_rank, 3.0),
        (stop_rank, 2.5),
        (break_in_mid_write, 0.7),
        (cut_network, 2.5),
        (reset_link, 1.5),
        (hang_write, 1.0),
        (stall_sender, 0.6),
        (cancel, 3.0),
        (scale_up, 1.0),
        (scale_down, 1.0),
        (kill_router, 0.4),
        (jump_clock, 0.7),
    )

    # -- running -----------------------------------------------------------------------------------------------------------------

    def is_over(self) -> bool:
        return (
            self.loop._now > self._end_of_events
            and all(client.outcome for client in self.clients)
            and all(rank.is_idle for rank in self.living())
            and not self.wire.num_on_wire
        )

    def run(self) -> None:
        """Raises AssertionError, which names the broken rule."""
        SimThread.current = self
        self.loop.at(0.0, lambda: self._make(self))
        try:
            self.loop.run(0.05)
            self.loop.run(self._end_of_events + self.times.calm_s, self.is_over)
            self._check_end()
        finally:
            self._tear_down()

    def _check_end(self) -> None:
        for client in self.clients:
            client.check()
            if not self.faults:
                assert client.outcome in ("ok", "Overloaded", "cancelled"), f"{client.name} ended with {client.outcome} in a sound world"
        for rank in self.living():
            assert rank.is_idle, f"{rank.name} is not idle"
            load = rank.engine.load if isinstance(rank, (PrefillRank, DecodeRank)) else None
            if isinstance(rank, DecodeRank):
                pages, slots = rank.engine._reservations.pages, rank.engine._reservations.slots
            else:
                assert isinstance(rank, PrefillRank)
                pages, slots = rank.engine._pages, rank.engine._slots
            assert pages.num_free == pages.num_total, f"{rank.name} leaks pages of {pages.owners()} ({load})"
            assert slots.num_free == slots.num_total, f"{rank.name} leaks slots of {slots.owners()}"
        for one in self.routers:
            if one.is_alive:
                assert one.service.num_requests == 0, f"{one.name} counts {one.service.num_requests} requests"
                for session in one.members._sessions.values():
                    assert not session.in_flight and not session._listeners, f"{one.name} still listens for {list(session._listeners)}"
                    assert not session.unanswered, f"{one.name} still waits for the answers to {session.unanswered}"

    def forget(self) -> None:
        """Take the world apart once nobody looks at it any more: what is left for the collector of garbage to find costs more."""
        parts: list[Any] = [self.wire, self.loop, *self.clients]
        for one in self.routers:
            parts += [*one.members._sessions.values(), one.members, one.relay, one.service, one]
        for rank in self.ranks.values():
            assert isinstance(rank, (PrefillRank, DecodeRank))
            transfer = rank.sender if isinstance(rank, PrefillRank) else rank.receiver
            parts += [rank.engine, transfer, rank.service, rank.runner, rank.transport, *rank.threads, rank]
        for part in (*parts, self):
            vars(part).clear()

    def _tear_down(self) -> None:
        """End what is left of the world's tasks; nothing that happens in it matters any more."""
        for process in (*self.routers, *self.ranks.values()):
            process.is_alive = False
        for one in self.routers:
            for session in one.members._sessions.values():
                session.is_connected = False
        self.loop.end()

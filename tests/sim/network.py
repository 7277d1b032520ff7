"""Processes that can be stopped and killed, and sessions between them that can be cut and broken.

A session delivers in order, with some delay. What is sent into a cut arrives when the cut heals, unless one end has given the session
up before, having heard nothing for its liveness timeout. A process that is killed resets its connections; one that is stopped is silent.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from tests.sim.times import times_of
from tests.sim.virtual_loop import VirtualLoop

RESET_S = 0.004
"""Until a connection that was broken on one side is known to be on the other."""


class Process:
    """Something with a clock of its own. Its events are lost with it, and wait while it is stopped."""

    def __init__(self, world: Network, name: str) -> None:
        self.world, self.name, self.loop = world, name, world.loop
        self.is_alive = True
        self.stopped_until = 0.0
        self.resumed_at = 0.0
        """On its own clock: when it was stopped last, the end of that."""
        self.clock_offset = world.rng.random() * 1000
        self.links: list[Link] = []

    def now(self) -> float:
        """Seconds on the process's own monotonic clock."""
        return self.loop._now + self.clock_offset

    @property
    def is_running(self) -> bool:
        return self.is_alive and self.loop._now >= self.stopped_until

    def later(self, delay: float, call: Callable[..., None], *args: Any) -> None:
        self.loop.at_owner(self.loop._now + delay, self, call, args)

    def jump(self, seconds: float) -> None:
        """The clock jumps ahead."""
        self.clock_offset += seconds

    def stop(self, seconds: float) -> None:
        self.stopped_until = self.loop._now + seconds
        self.resumed_at = self.now() + seconds
        for link in list(self.links):
            link.silence(self, seconds)

    def kill(self) -> None:
        self.is_alive = False
        for link in list(self.links):
            link.end(self, f"{self.name} is gone")


class Network:
    """What a world has of it: a loop, a generator, and which pairs cannot reach each other."""

    def __init__(self, seed: int) -> None:
        self.loop, self.rng, self.times = VirtualLoop(), random.Random(seed), times_of(seed)
        self.current: Process | None = None
        self.cuts: dict[frozenset[Process], float] = {}
        """Pair -> when it heals."""
        self.links: list[Link] = []

    def is_cut(self, a: Process, b: Process) -> bool:
        return self.loop._now < self.cuts.get(frozenset((a, b)), 0.0)

    def travel_s(self) -> float:
        """How long a message is under way."""
        return 0.001 + 0.004 * self.rng.random()

    def cut(self, a: Process, b: Process, seconds: float) -> None:
        self.cuts[frozenset((a, b))] = self.loop._now + seconds
        for link in list(self.links):
            if {link.ends[0].process, link.ends[1].process} == {a, b}:
                for end in link.ends:
                    link.silence(end.process, seconds)


class End:
    """One end of a session: who takes what arrives, and who is told when it is over."""

    def __init__(self, process: Process, take: Callable[[Any], None], lost: Callable[[str], None]) -> None:
        self.process, self.take, self.lost = process, take, lost
        self.is_open = True
        self.next_at = 0.0
        """Nothing arrives here before this, so that the order stays."""

    def arrive(self, message: Any) -> None:
        if self.is_open:
            self.take(message)


class Link:
    """A session. `ends[0]` began it."""

    def __init__(self, network: Network, a: End, b: End) -> None:
        self.network, self.ends = network, (a, b)
        network.links.append(self)
        for end in self.ends:
            end.process.links.append(self)

    def send(self, sender: End, message: Any) -> None:
        """Nothing is sent over a session that this end knows to be over."""
        if not sender.is_open:
            return
        other = self.ends[1] if sender is self.ends[0] else self.ends[0]
        network = self.network
        now = network.loop._now
        when = now + network.travel_s()
        if network.cuts:
            when += max(0.0, network.cuts.get(frozenset((sender.process, other.process)), 0.0) - now)
        if when < other.next_at:
            when = other.next_at
        other.next_at = when
        network.loop.at_owner(when, other.process, other.arrive, (message,))

    def end(self, process: Process, reason: str) -> None:
        """This process ends the session, or is gone; the other end is told as soon as a message could arrive."""
        mine, other = self.ends if self.ends[0].process is process else self.ends[::-1]
        mine.is_open = False
        self._forget()
        if not other.is_open:
            return
        cut_for = self.network.cuts.get(frozenset((mine.process, other.process)), 0.0) - self.network.loop._now
        delay = RESET_S if cut_for <= 0 else min(cut_for, self.network.times.liveness_s)
        other.process.later(delay, self._lose, other, reason)

    def silence(self, process: Process, seconds: float) -> None:
        """Nothing comes from this process for so long: the other end gives up if that is too long for it."""
        other = self.ends[1] if self.ends[0].process is process else self.ends[0]
        wait = self.network.times.liveness_s * (1 + 0.2 * self.network.rng.random())
        if seconds > wait and other.is_open:
            other.process.later(wait, self._lose, other, f"nothing heard for {self.network.times.liveness_s:g} s")

    def reset(self) -> None:
        """The connection breaks; both ends notice."""
        for end in self.ends:
            if end.is_open:
                end.process.later(RESET_S * (1 + self.network.rng.random()), self._lose, end, "connection reset")

    def _lose(self, end: End, reason: str) -> None:
        if not end.is_open:
            return
        end.is_open = False
        end.lost(reason)
        self.end(end.process, reason)

    def _forget(self) -> None:
        if self in self.network.links:
            self.network.links.remove(self)
            for end in self.ends:
                end.process.links.remove(self)

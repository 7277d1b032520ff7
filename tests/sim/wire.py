"""The transport of the simulation, with the manners of NIXL over UCX.

Bytes get on the wire only while their writer polls; failed writes may land later; nothing recalls what is on the wire: it lands within
Times.wire_s, in whatever order, unless the receiver was reset in between. Commits may be late and repeated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from core.errors import TransferFailed
from core.region import Region
from kv_transfer.transport import Polled, Write
from tests.sim.network import Network, Process

NOTHING_NEW = Polled((), ())

SLOW = 0.1
"""Part of the writes that take many polls."""


@dataclass(frozen=True, slots=True)
class Tag:
    """Which hand-off a write belongs to, for the checks."""

    request_id: str
    epoch: int


@dataclass(frozen=True, slots=True)
class TaggedWrite(Write):
    tag: Tag = Tag("", 0)


@dataclass(eq=False)
class Flight:
    write_id: int
    peer: str
    source: Host
    target: SimTransport
    generation: int
    """Of the target, when the connection was made."""
    write: TaggedWrite
    pieces: list[tuple[str, int, int]]
    """("page" or "slot", local, remote): not on the wire yet."""
    since: float
    num_on_wire: int = 0
    is_failed: bool = False
    is_slow: bool = False
    """Few polls bring a piece on the wire."""
    hangs: bool = False


class Host(Process):
    """A process with memory that a transport can read and write."""

    def read(self, tag: Tag, kind: str, piece: int) -> int | None:
        raise NotImplementedError

    def land(self, tag: Tag, kind: str, piece: int, content: int | None) -> None:
        raise NotImplementedError

    def check_link(self, peer: str) -> None:
        """Whether it may write to this peer now."""
        raise NotImplementedError


class Wire:
    """All transports of a world."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.transports: dict[bytes, SimTransport] = {}
        self.flights: list[Flight] = []
        self.repeats = self.loses = self.fails = 0.0
        """How likely a commit is told again, or not at all, and a write fails."""
        self.num_on_wire = 0


class SimTransport:
    def __init__(self, wire: Wire, host: Host) -> None:
        self.wire, self.host, self.network = wire, host, wire.network
        self.generation = 0
        self._peers: dict[str, tuple[SimTransport, int]] = {}
        self.flights: list[Flight] = []
        self._finished: list[tuple[int, bool]] = []
        self._notes: list[bytes] = []
        self._next_write = 0
        self.told: Callable[[], None] = lambda: None
        """Called when a commit has arrived that the next poll will find."""

    # -- the verbs -------------------------------------------------------------------------------------------------------------

    def register(self, pages: Region, slots: Region) -> bytes:
        agent = f"{self.host.name}/{id(self)}/{self.generation}".encode()
        self.wire.transports[agent] = self
        return agent

    def connect(self, peer: str, agent: bytes, pages: Region, slots: Region) -> tuple[str, ...]:
        target = self.wire.transports.get(agent)
        if target is None or not target.host.is_alive:
            raise TransferFailed(f"cannot connect to {peer}")
        self._peers[peer] = (target, target.generation)
        return ()

    def disconnect(self, peer: str) -> None:
        assert not any(flight.peer == peer for flight in self.flights), f"writes to {peer} are unfinished"
        self._peers.pop(peer, None)

    def write(self, peer: str, write: Write) -> int:
        if peer not in self._peers:
            raise TransferFailed(f"not connected to {peer}")
        assert isinstance(write, TaggedWrite)
        self._next_write += 1
        target, generation = self._peers[peer]
        pieces = [("page", local, remote) for local, remote in write.pages]
        if write.slot is not None:
            pieces.append(("slot", *write.slot))
        flight = Flight(self._next_write, peer, self.host, target, generation, write, pieces, self.network.loop._now)
        flight.is_failed = self.network.rng.random() < self.wire.fails
        flight.is_slow = self.network.rng.random() < SLOW
        self.flights.append(flight)
        self.wire.flights.append(flight)
        return flight.write_id

    def poll(self) -> Polled:
        if self.flights:
            self.advance()
        if not self._finished and not self._notes:
            return NOTHING_NEW
        finished, self._finished = tuple(self._finished), []
        notes, self._notes = tuple(self._notes), []
        return Polled(finished, notes)

    def reset(self) -> bytes:
        """What is not on the wire never will be, and nothing of older connections lands here."""
        for flight in self.flights:
            self.wire.flights.remove(flight)
        self.flights.clear()
        self._peers.clear()
        self._finished.clear()
        self._notes.clear()
        self.generation += 1
        return self.register(None, None)  # type: ignore[arg-type]

    def close(self) -> None:
        self.reset()

    # -- what happens ----------------------------------------------------------------------------------------------------------

    def advance(self, *, is_careless: bool = False) -> None:
        """The host lets its transport work. is_careless: without looking at the time before."""
        network = self.network
        now = network.loop._now
        for flight in list(self.flights):
            target = flight.target
            is_broken = not target.host.is_alive or target.generation != flight.generation
            if not is_broken and (network.cuts and network.is_cut(self.host, target.host)):
                is_broken = now - flight.since > network.times.wire_s
                if not is_broken:
                    continue
            if flight.is_failed or is_broken:
                if flight.pieces and not is_broken and network.rng.random() < 0.5:
                    self._put_on_wire(flight, flight.pieces.pop())  # a part of it got out
                self._finish(flight, False)
            elif not flight.hangs:
                if flight.pieces and not is_careless:
                    self.host.check_link(flight.peer)
                while flight.pieces and not (flight.is_slow and network.rng.random() < 0.8):
                    self._put_on_wire(flight, flight.pieces.pop())

    def _put_on_wire(self, flight: Flight, piece: tuple[str, int, int]) -> None:
        kind, local, remote = piece
        tag, target, network = flight.write.tag, flight.target, self.network
        content = self.host.read(tag, kind, local)
        flight.num_on_wire += 1
        self.wire.num_on_wire += 1
        rare = network.rng.random()
        delay = 0.002 + 0.04 * rare if rare < 0.95 else network.times.wire_s * network.rng.random()

        def land() -> None:
            if target.host.is_alive and target.generation == flight.generation:
                target.host.land(tag, kind, remote, content)
            flight.num_on_wire -= 1
            self.wire.num_on_wire -= 1
            if not flight.pieces and not flight.num_on_wire and flight in self.flights:
                self._out(flight)

        network.loop.at(network.loop._now + delay, land)

    def _out(self, flight: Flight) -> None:
        """All of it has landed; its commit follows, and the writer learns of it."""
        if flight.target.generation != flight.generation or not flight.target.host.is_alive or flight.is_failed:
            return
        self._finish(flight, True)
        note = flight.write.notification
        if note and self.network.rng.random() >= self.wire.loses:
            self._tell(flight, note, 0.02 * self.network.rng.random())
            if self.network.rng.random() < self.wire.repeats:
                self._tell(flight, note, 3 * self.network.times.wire_s * self.network.rng.random())

    def _tell(self, flight: Flight, note: bytes, delay: float) -> None:
        def tell() -> None:
            if flight.target.generation == flight.generation:
                flight.target._notes.append(note)
                flight.target.told()

        self.network.loop.at(self.network.loop._now + delay, tell)

    def _finish(self, flight: Flight, succeeded: bool) -> None:
        self.flights.remove(flight)
        self.wire.flights.remove(flight)
        self._finished.append((flight.write_id, succeeded))

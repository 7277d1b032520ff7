"""Copies within one process, for tests and simulation.

As with NIXL, bytes move only while the writer polls, and `disconnect` stops nothing. `fate` decides what becomes of each write: it may
be delayed, hang, fail, and land all the same.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from core.errors import TransferFailed
from core.region import Region
from kv_transfer.transport import Polled, Write


@dataclass(frozen=True, slots=True)
class Fate:
    """What becomes of a write."""

    delay_polls: int = 0
    """Polls of the writer before it lands; a large number: it hangs."""
    is_reported_failed: bool = False
    """The next poll says that it failed. Its pages land all the same after `delay_polls`, its notification never."""


@dataclass(slots=True)
class _Pending:
    write_id: int
    agent: str
    write: Write
    regions: tuple[Region, Region]
    fate: Fate
    num_polls: int = 0
    is_reported: bool = False


class MemoryTransport:
    agents: ClassVar[dict[str, MemoryTransport]] = {}
    """Agent bytes -> transport: the whole network of one process."""

    def __init__(self, name: str) -> None:
        self.fate: Callable[[Write], Fate] = lambda write: Fate()
        self._name = name
        self._agent = ""
        self._num_resets = 0
        self._regions: tuple[Region, Region] | None = None
        self._peers: dict[str, tuple[str, Region, Region]] = {}
        self._pending: list[_Pending] = []
        self._inbox: list[bytes] = []
        self._next_write = 0

    def register(self, pages: Region, slots: Region) -> bytes:
        self._regions = (pages, slots)
        self._agent = f"{self._name}/{self._num_resets}"
        self.agents[self._agent] = self
        return self._agent.encode()

    def connect(self, peer: str, agent: bytes, pages: Region, slots: Region) -> tuple[str, ...]:
        if agent.decode() not in self.agents:
            raise TransferFailed(f"cannot connect to {peer}: no agent {agent.decode()}")
        self._peers[peer] = (agent.decode(), pages, slots)
        return ()

    def disconnect(self, peer: str) -> None:
        self._peers.pop(peer, None)

    def write(self, peer: str, write: Write) -> int:
        if peer not in self._peers:
            raise TransferFailed(f"not connected to {peer}")
        agent, pages, slots = self._peers[peer]
        self._next_write += 1
        self._pending.append(_Pending(self._next_write, agent, write, (pages, slots), self.fate(write)))
        return self._next_write

    def poll(self) -> Polled:
        finished: list[tuple[int, bool]] = []
        for one in list(self._pending):
            one.num_polls += 1
            target = self.agents.get(one.agent)
            if (target is None or one.fate.is_reported_failed) and not one.is_reported:
                finished.append((one.write_id, False))
                one.is_reported = True
            if target is None:
                self._pending.remove(one)
            elif one.num_polls > one.fate.delay_polls:
                self._pending.remove(one)
                self._copy(one)
                if not one.is_reported:
                    finished.append((one.write_id, True))
                    if one.write.notification:
                        target._inbox.append(one.write.notification)
        notes, self._inbox = tuple(self._inbox), []
        return Polled(tuple(finished), notes)

    def _copy(self, one: _Pending) -> None:
        assert self._regions is not None, "register comes first"
        write = one.write
        for ours, theirs, pairs in zip(self._regions, one.regions, (write.pages, (write.slot,) if write.slot else ()), strict=True):
            for local, remote in pairs:
                size = ours.piece_bytes
                ctypes.memmove(theirs.address + remote * size, ours.address + local * size, size)

    def reset(self) -> bytes:
        assert self._regions is not None, "register comes first"
        self.close()
        self._num_resets += 1
        return self.register(*self._regions)

    def close(self) -> None:
        self.agents.pop(self._agent, None)
        self._peers.clear()
        self._pending.clear()
        self._inbox.clear()

"""Copies within one process, for tests and simulation. Writes land when the writer polls, so that they can be late."""

from __future__ import annotations

import ctypes
from typing import ClassVar

from core.errors import TransferFailed
from kv_transfer.transport import Polled, Region, Write


class MemoryTransport:
    """`agents` maps name to transport: the whole network of one process."""

    agents: ClassVar[dict[str, MemoryTransport]] = {}

    def __init__(self, name: str) -> None:
        self.name = name
        self.agents[name] = self
        self._regions: tuple[Region, Region] | None = None
        self._peers: dict[str, tuple[str, Region, Region]] = {}
        self._pending: list[tuple[int, str, Write]] = []
        self._finished: list[tuple[int, bool]] = []
        self._inbox: list[bytes] = []
        self._next_write = 0

    def register(self, pages: Region, slots: Region) -> bytes:
        self._regions = (pages, slots)
        return self.name.encode()

    def connect(self, peer: str, agent: bytes, pages: Region, slots: Region) -> None:
        if agent.decode() not in self.agents:
            raise TransferFailed(f"cannot connect to {peer}: no such agent")
        self._peers[peer] = (agent.decode(), pages, slots)

    def disconnect(self, peer: str) -> None:
        self._peers.pop(peer, None)
        self._finished += [(write_id, False) for write_id, owner, _ in self._pending if owner == peer]
        self._pending = [pending for pending in self._pending if pending[1] != peer]

    def write(self, peer: str, write: Write) -> int:
        if peer not in self._peers:
            raise TransferFailed(f"not connected to {peer}")
        self._next_write += 1
        self._pending.append((self._next_write, peer, write))
        return self._next_write

    def poll(self) -> Polled:
        pending, self._pending = self._pending, []
        for write_id, peer, write in pending:
            agent, pages, slots = self._peers[peer]
            target = self.agents.get(agent)
            if target is not None:
                self._copy(write, pages, slots)
                if write.notification:
                    target._inbox.append(write.notification)
            self._finished.append((write_id, target is not None))
        finished, self._finished = tuple(self._finished), []
        notes, self._inbox = tuple(self._inbox), []
        return Polled(finished, notes)

    def _copy(self, write: Write, pages: Region, slots: Region) -> None:
        assert self._regions is not None, "register comes first"
        for ours, theirs, pairs in (
            (self._regions[0], pages, write.pages),
            (self._regions[1], slots, (write.slot,) if write.slot else ()),
        ):
            for local, remote in pairs:
                size = ours.piece_bytes
                ctypes.memmove(theirs.address + remote * size, ours.address + local * size, size)

    def close(self) -> None:
        self.agents.pop(self.name, None)

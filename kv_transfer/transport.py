"""What the transfer needs of a transport, and nothing more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from core.region import Region


@dataclass(frozen=True, slots=True)
class Write:
    """Pieces to copy to a peer: (local id, remote id) of pages and, with the last write, the slot."""

    pages: tuple[tuple[int, int], ...]
    slot: tuple[int, int] | None = None
    notification: bytes = b""
    """Delivered to the peer after all pieces of this write have landed."""


@dataclass(frozen=True, slots=True)
class Polled:
    finished: tuple[tuple[int, bool], ...]
    """(write id, succeeded). A write that succeeded is out: nothing of it lands later. Pieces of one that failed may still land, until
    the bytes on the wire have arrived or the peer has reset its transport."""
    notifications: tuple[bytes, ...]


class Transport(Protocol):
    """Used by one thread. A failed peer raises TransferFailed, and only its writes fail.

    Bytes move and connections break only inside these calls: both sides must poll while anything is under way.
    """

    def register(self, pages: Region, slots: Region) -> bytes:
        """Make own memory known; once. It must stay allocated as long as the process lives, since a peer that was cut off may still write
        to it. Returns the agent bytes that a peer needs to `connect`."""
        ...

    def connect(self, peer: str, agent: bytes, pages: Region, slots: Region) -> tuple[str, ...]:
        """Prepare writes into a peer's regions. Returns the lanes of the connection (`lanes.py`), none if the transport cannot say."""
        ...

    def disconnect(self, peer: str) -> None:
        """Forget a peer, all of whose writes have finished (to stop unfinished ones takes `reset`). Unknown peers are ignored."""
        ...

    def write(self, peer: str, write: Write) -> int:
        """Start a write; returns its id. Never waits for the wire, but may copy inline."""
        ...

    def poll(self) -> Polled: ...

    def reset(self) -> bytes:
        """Break every connection in both directions, forget all peers and writes, and begin anew with the same memory; returns new agent
        bytes. Nothing that was not yet on the wire is sent, and nothing that has not landed in own memory lands, except by peers on
        this host that write through shared memory or CUDA IPC."""
        ...

    def close(self) -> None: ...

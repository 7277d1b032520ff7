"""The receiving half of hand-offs: pure. It knows which epochs may be written by whom, and when that has ended for certain.

    EXPECTED --first renew by a sender--> OPEN --commit--> COMMITTED --release--> (gone)
        |                                  |                  |
        | revoke: nobody may write         | revoke           | revoke
        v                                  v                  v
      (gone, Quiesced at once)          REVOKED --last_write_out, or the sender lost and quarantine over--> (gone, Quiesced)

A sender may write for an epoch only after the answer `live` to its first renew; so an epoch that nobody opened is safe to free.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Phase(enum.Enum):
    EXPECTED = "expected"
    OPEN = "open"
    COMMITTED = "committed"
    REVOKED = "revoked"


@dataclass(slots=True)
class Expected:
    request_id: str
    num_pages: int
    num_tokens: int
    phase: Phase = Phase.EXPECTED
    sender: str = ""
    quiet_at: float | None = None
    """Set when the sender was lost: from then on no write of it can land."""


@dataclass(frozen=True, slots=True)
class Arrived:
    """A commit as it came in, already decoded."""

    epoch: int
    receiver_incarnation: int
    sender: str
    request_id: str
    num_tokens: int
    num_pages: int
    first_token: int
    checksums: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Live:
    sender: str
    epoch: int


@dataclass(frozen=True, slots=True)
class Revoke:
    sender: str
    epoch: int


@dataclass(frozen=True, slots=True)
class Release:
    sender: str
    epoch: int


@dataclass(frozen=True, slots=True)
class Committed:
    """Event: all bytes are here."""

    epoch: int
    first_token: int


@dataclass(frozen=True, slots=True)
class Renewed:
    """Event: the sender works for this epoch."""

    epoch: int


@dataclass(frozen=True, slots=True)
class Quiesced:
    """Event: no write for this epoch can land any more; its pages are free to use."""

    epoch: int


@dataclass(frozen=True, slots=True)
class SenderLost:
    """Event: the sender of this uncommitted epoch is gone."""

    epoch: int


@dataclass(frozen=True, slots=True)
class Ignored:
    """A commit that is void: late, repeated, or for somebody else. For the log."""

    epoch: int
    reason: str


Action = Live | Revoke | Release | Committed | Renewed | Quiesced | SenderLost | Ignored


class Receiver:
    """All epochs of one decode rank."""

    def __init__(self, *, incarnation: int, quarantine_s: float) -> None:
        self._incarnation, self._quarantine_s = incarnation, quarantine_s
        self._epochs: dict[int, Expected] = {}

    @property
    def num_open(self) -> int:
        """Epochs that something may still arrive for."""
        return len(self._epochs)

    def expect(self, epoch: int, request_id: str, num_pages: int, num_tokens: int) -> None:
        assert epoch not in self._epochs, f"{epoch=} is expected already"
        self._epochs[epoch] = Expected(request_id, num_pages, num_tokens)

    def renew(self, sender: str, epoch: int) -> list[Action]:
        found = self._epochs.get(epoch)
        if found is None or found.phase is Phase.REVOKED:
            return [Revoke(sender, epoch)]
        if found.phase is Phase.EXPECTED:
            found.phase, found.sender = Phase.OPEN, sender
            return [Live(sender, epoch), Renewed(epoch)]
        # A second sender for one epoch would be a bug of the router; the first keeps it.
        return [Renewed(epoch)] if found.sender == sender else [Revoke(sender, epoch)]

    def commit(self, arrived: Arrived) -> list[Action]:
        found = self._epochs.get(arrived.epoch)
        if arrived.receiver_incarnation != self._incarnation:
            return [Ignored(arrived.epoch, "meant for another incarnation")]
        if found is None:
            return [Ignored(arrived.epoch, "unknown epoch")]
        if found.phase is not Phase.OPEN or found.sender != arrived.sender:
            return [Ignored(arrived.epoch, f"epoch is {found.phase.value}, opened by {found.sender or 'nobody'}")]
        if (arrived.request_id, arrived.num_pages, arrived.num_tokens) != (found.request_id, found.num_pages, found.num_tokens):
            return [Ignored(arrived.epoch, f"does not fit the reservation of {found.request_id}")]
        found.phase = Phase.COMMITTED
        return [Committed(arrived.epoch, arrived.first_token)]

    def release(self, epoch: int) -> list[Action]:
        """The sequence took its first step: the sender may forget it."""
        found = self._epochs.pop(epoch, None)
        return [Release(found.sender, epoch)] if found is not None else []

    def revoke(self, epoch: int, now: float) -> list[Action]:
        found = self._epochs.get(epoch)
        if found is None or found.phase is Phase.REVOKED:
            return []
        if found.phase is Phase.EXPECTED:
            del self._epochs[epoch]
            return [Quiesced(epoch)]
        if found.phase is Phase.COMMITTED:  # its last write has landed
            del self._epochs[epoch]
            return [Release(found.sender, epoch), Quiesced(epoch)]
        found.phase = Phase.REVOKED
        return [] if found.quiet_at is not None else [Revoke(found.sender, epoch)]

    def last_write_out(self, sender: str, epoch: int) -> list[Action]:
        found = self._epochs.get(epoch)
        if found is None or found.sender != sender or found.phase is Phase.COMMITTED:
            return []
        del self._epochs[epoch]
        lost: list[Action] = [SenderLost(epoch)] if found.phase is Phase.OPEN else []
        return [*lost, Quiesced(epoch)]

    def sender_lost(self, sender: str, now: float) -> list[Action]:
        """The session broke and the transport was disconnected."""
        actions: list[Action] = []
        for epoch, found in self._epochs.items():
            if found.sender == sender and found.phase in (Phase.OPEN, Phase.REVOKED):
                found.quiet_at = now + self._quarantine_s
                if found.phase is Phase.OPEN:
                    found.phase = Phase.REVOKED
                    actions.append(SenderLost(epoch))
        return actions

    def tick(self, now: float) -> list[Action]:
        due = [epoch for epoch, found in self._epochs.items() if found.quiet_at is not None and now >= found.quiet_at]
        for epoch in due:
            del self._epochs[epoch]
        return [Quiesced(epoch) for epoch in due]

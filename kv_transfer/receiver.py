"""The receiving half of hand-offs: pure. It knows which epochs may be written by whom, and when that has ended for certain.

    EXPECTED --first renew by a sender--> OPEN --commit--> COMMITTED --release--> (gone)
        |                                  |                  |
        | revoke: nobody may write         | revoke, reject,  | revoke: its last write has landed
        |                                  | sender lost      |
        v                                  v                  v
      (gone, Quiesced at once)          REVOKED            (gone, Quiesced at once)
                                           |
                                           '--last_write_out, or the sender lost and its quarantine over--> (gone, Quiesced)

A sender may write for an epoch only after the answer `live` to its first renew; so an epoch that nobody opened is safe to free.
A *sender* here is one session with a prefill rank; the rank's next session is another sender.

A sender that was lost stops its writes by itself in less than the quarantine (see `sender.py`), unless it was stopped, and goes on later
where it was. So its process is asked whether it is over with the session, again and again (Ask): it may say so, or be dead. If there is no
such proof when the quarantine ends, the transport is reset before pages that it could still write to are given free (Fence).
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

ASK_AGAIN_S = 0.5
"""After an answer that proved nothing."""


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
    answer_by: float | None = None
    """Set with REVOKED while the sender lives: when it must have said that its last write is out."""
    quiet_at: float | None = None
    """Set when the sender was lost: from then on no write of it can land, if it was not stopped."""
    is_over: bool = False
    """It is proven that its sender writes nothing more, or what it writes is shut out."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a session came from."""

    address: str
    """host:port at which the prefill rank listens."""
    incarnation: int
    link: str
    """The sender's name for the session."""
    was_reached: bool
    """This life of the rank has answered at the address."""


@dataclass(slots=True)
class Doubt:
    """Of a lost sender: whether it still writes."""

    origin: Origin
    ask_at: float | None
    """None: it is being asked."""


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
class HangUp:
    """End this session: it does not do what it must. `sender_lost` follows."""

    sender: str
    reason: str


@dataclass(frozen=True, slots=True)
class Ask:
    """Find out whether this sender, whose session ended, is over with it, and say so: `answered`."""

    sender: str
    origin: Origin


@dataclass(frozen=True, slots=True)
class Fence:
    """Reset the transport before anything that follows, and end all sessions."""


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
    """Event: this uncommitted epoch will not be committed."""

    epoch: int
    reason: str


Action = Live | Revoke | Release | HangUp | Ask | Fence | Committed | Renewed | Quiesced | SenderLost


class Receiver:
    """All epochs of one decode rank."""

    def __init__(self, *, incarnation: int, quarantine_s: float, drain_s: float, answer_s: float) -> None:
        """quarantine_s: of pages of a lost sender. drain_s: how long bytes may be under way of a sender that has just proven to be over.
        answer_s: how long a sender may take to say that its last write is out."""
        self._incarnation, self._quarantine_s, self._drain_s, self._answer_s = incarnation, quarantine_s, drain_s, answer_s
        self._epochs: dict[int, Expected] = {}
        self._doubts: dict[str, Doubt] = {}
        """By sender."""

    @property
    def num_open(self) -> int:
        """Epochs that something may still arrive for."""
        return len(self._epochs)

    @property
    def num_quarantined_pages(self) -> int:
        """Pages of revoked epochs, as far as the sender may write to them."""
        return sum(found.num_pages for found in self._epochs.values() if found.phase is Phase.REVOKED)

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

    def why_void(self, arrived: Arrived) -> str | None:
        """Why a commit does not count: late, repeated, or meant for somebody else. None if it does."""
        found = self._epochs.get(arrived.epoch)
        if arrived.receiver_incarnation != self._incarnation:
            return "meant for another incarnation"
        if found is None:
            return "unknown epoch"
        if found.phase is not Phase.OPEN or found.sender != arrived.sender:
            return f"epoch is {found.phase.value}, opened by {found.sender or 'nobody'}"
        if (arrived.request_id, arrived.num_pages, arrived.num_tokens) != (found.request_id, found.num_pages, found.num_tokens):
            return f"does not fit the reservation of {found.request_id}"
        return None

    def commit(self, arrived: Arrived) -> list[Action]:
        """A void commit changes nothing."""
        if self.why_void(arrived) is not None:
            return []
        self._epochs[arrived.epoch].phase = Phase.COMMITTED
        return [Committed(arrived.epoch, arrived.first_token)]

    def reject(self, epoch: int, reason: str, now: float) -> list[Action]:
        """What arrived for an open epoch is not what was sent."""
        return [SenderLost(epoch, reason), *self.revoke(epoch, now)]

    def release(self, epoch: int) -> list[Action]:
        """The sequence took its first step: the sender may forget it."""
        found = self._epochs.pop(epoch, None)
        return [Release(found.sender, epoch)] if found is not None else []

    def revoke(self, epoch: int, now: float) -> list[Action]:
        """Nobody may write for it any more. Quiesced follows, now or later; an unknown epoch has been closed before."""
        found = self._epochs.get(epoch)
        if found is None:
            return [Quiesced(epoch)]
        if found.phase is Phase.REVOKED:
            return []
        if found.phase is Phase.EXPECTED:
            del self._epochs[epoch]
            return [Quiesced(epoch)]
        if found.phase is Phase.COMMITTED:
            del self._epochs[epoch]
            return [Revoke(found.sender, epoch), Quiesced(epoch)]  # not released: no step was taken
        found.phase, found.answer_by = Phase.REVOKED, now + self._answer_s
        return [Revoke(found.sender, epoch)]

    def last_write_out(self, sender: str, epoch: int) -> list[Action]:
        found = self._epochs.get(epoch)
        if found is None or found.sender != sender or found.phase is Phase.COMMITTED:
            return []
        del self._epochs[epoch]
        lost: list[Action] = [SenderLost(epoch, "the prefill rank gave up before the commit")] if found.phase is Phase.OPEN else []
        return [*lost, Quiesced(epoch)]

    def sender_lost(self, sender: str, origin: Origin, now: float) -> list[Action]:
        """The session ended, for whatever reason."""
        actions: list[Action] = []
        for epoch, found in self._epochs.items():
            if found.sender != sender or found.phase not in (Phase.OPEN, Phase.REVOKED):
                continue
            found.answer_by, found.quiet_at = None, now + self._quarantine_s
            if not found.is_over:
                self._doubts[sender] = Doubt(origin, None)
            if found.phase is Phase.OPEN:
                found.phase = Phase.REVOKED
                actions.append(SenderLost(epoch, "the prefill rank was lost before the commit"))
        return [*actions, Ask(sender, origin)] if sender in self._doubts else actions

    def answered(self, sender: str, is_over: bool, now: float) -> None:
        """The answer to Ask. is_over: it has no write under way and begins none, or is dead; bytes may still be on the wire."""
        doubt = self._doubts.get(sender)
        if doubt is None:
            return
        doubt.ask_at = now + ASK_AGAIN_S
        if is_over:
            del self._doubts[sender]
            for found in self._epochs.values():
                if found.sender == sender and found.quiet_at is not None:
                    found.is_over, found.quiet_at = True, max(found.quiet_at, now + self._drain_s)

    def tick(self, now: float) -> list[Action]:
        actions: list[Action] = []
        due = [epoch for epoch, found in self._epochs.items() if found.quiet_at is not None and now >= found.quiet_at]
        if any(not self._epochs[epoch].is_over for epoch in due):
            actions.append(Fence())
            self._doubts.clear()
            for found in self._epochs.values():
                found.is_over = found.phase is not Phase.EXPECTED  # whoever opened it did so over a connection that is broken now
        for epoch in due:
            del self._epochs[epoch]
            actions.append(Quiesced(epoch))
        for sender, doubt in self._doubts.items():
            if doubt.ask_at is not None and now >= doubt.ask_at:
                doubt.ask_at = None
                actions.append(Ask(sender, doubt.origin))
        late = {found.sender for found in self._epochs.values() if found.answer_by is not None and now >= found.answer_by}
        return actions + [HangUp(sender, f"no answer to a revocation for {self._answer_s:g} s") for sender in sorted(late)]

"""The sending half of hand-offs: pure. Events and `now` in, actions out; no socket, clock or memory inside.

    OPENING --live--> SENDING --commit() and all pages out--> COMMITTING --last write out--> COMMITTED --released--> (gone)
        \\________________|___________________________________________|  abort, revoked, failed write, deadline, peer lost
                         v
                     CLOSING --no write in flight--> (gone; last_write_out told if the peer lives)

Rules: a page is written only while its epoch is live (the receiver said so and has not revoked it); the write with the slot and the
commit is posted only when every earlier write is out; local pages stay until Closed.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass, field

from core.errors import BatonError, Cancelled, DeadlineExceeded, MemberLost, TransferFailed
from core.request import Reservation


class Phase(enum.Enum):
    OPENING = "opening"
    SENDING = "sending"
    COMMITTING = "committing"
    COMMITTED = "committed"
    CLOSING = "closing"


@dataclass(frozen=True, slots=True)
class CommitOrder:
    """The last write of a hand-off: the slot, and what the receiver is told with it."""

    local_slot_id: int
    num_tokens: int
    first_token: int


@dataclass(slots=True)
class HandOff:
    request_id: str
    peer: str
    reservation: Reservation
    phase: Phase
    renewed_at: float
    pages: list[tuple[int, int]] = field(default_factory=list)
    """(local, remote) still to be written, in order."""
    in_flight: dict[int, int] = field(default_factory=dict)
    """Write id -> bytes."""
    num_posting: int = 0
    """Post actions given out and not yet answered by `posted` or `write_refused`."""
    order: CommitOrder | None = None
    ordered_at: float = 0.0
    num_bytes: int = 0
    error: BatonError | None = None
    all_pages: list[tuple[int, int]] = field(default_factory=list)
    """Everything pushed, for the checksums of checked mode."""


@dataclass(frozen=True, slots=True)
class Post:
    """Write these pages (and the slot, with the commit) to the peer; answer with `posted` or `write_refused`."""

    request_id: str
    peer: str
    pages: tuple[tuple[int, int], ...]
    order: CommitOrder | None


@dataclass(frozen=True, slots=True)
class Renew:
    peer: str
    epochs: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LastWriteOut:
    peer: str
    epoch: int


@dataclass(frozen=True, slots=True)
class HandedOff:
    """Event: everything is in the receiver's memory. seconds: from the order to commit to its landing."""

    request_id: str
    num_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Closed:
    """Event: no write of this hand-off is in flight, its local pages may be freed. error: None if decode took over."""

    request_id: str
    error: BatonError | None


Action = Post | Renew | LastWriteOut | HandedOff | Closed


class Sender:
    """All hand-offs of one prefill rank."""

    def __init__(self, *, page_bytes: int, slot_bytes: int, max_bytes_in_flight: int, deadline_s: float) -> None:
        self._page_bytes, self._slot_bytes = page_bytes, slot_bytes
        self._max_bytes, self._deadline_s = max_bytes_in_flight, deadline_s
        self._hand_offs: dict[str, HandOff] = {}
        self._by_epoch: dict[tuple[str, int], HandOff] = {}

    @property
    def num_open(self) -> int:
        return len(self._hand_offs)

    @property
    def bytes_in_flight(self) -> int:
        return sum(sum(h.in_flight.values()) for h in self._hand_offs.values())

    @property
    def needs_progress(self) -> bool:
        """Whether the transport must be polled: a write is out, or a commit's notification may still be on its way."""
        return any(h.in_flight or h.phase is Phase.COMMITTED for h in self._hand_offs.values())

    def hand_off(self, request_id: str) -> HandOff | None:
        return self._hand_offs.get(request_id)

    # -- orders of the worker ------------------------------------------------------------------------------------------------

    def open(self, request_id: str, peer: str, reservation: Reservation, now: float) -> list[Action]:
        """Ask the receiver whether the epoch is live; pages may be pushed meanwhile."""
        assert request_id not in self._hand_offs, f"{request_id} is open already"
        hand_off = HandOff(request_id, peer, reservation, Phase.OPENING, now)
        self._hand_offs[request_id] = self._by_epoch[peer, reservation.epoch] = hand_off
        return [Renew(peer, (reservation.epoch,))]

    def push(self, request_id: str, first_page: int, local_page_ids: Iterable[int], now: float) -> list[Action]:
        """Pages first_page, first_page + 1, ... of the sequence are final."""
        hand_off = self._hand_offs.get(request_id)
        if hand_off is None or hand_off.phase is Phase.CLOSING:
            return []
        for place, local in enumerate(local_page_ids, first_page):
            assert place < len(hand_off.reservation.page_ids), f"page {place} of {request_id} was not reserved"
            pair = (local, hand_off.reservation.page_ids[place])
            hand_off.pages.append(pair)
            hand_off.all_pages.append(pair)
        return self._pump(now)

    def commit(self, request_id: str, order: CommitOrder, now: float) -> list[Action]:
        """All pages have been pushed; after them the slot."""
        hand_off = self._hand_offs.get(request_id)
        if hand_off is None or hand_off.phase is Phase.CLOSING:
            return []
        hand_off.order, hand_off.ordered_at = order, now
        return self._pump(now)

    def abort(self, request_id: str, now: float) -> list[Action]:
        """Stop writing. Closed follows when nothing is in flight."""
        hand_off = self._hand_offs.get(request_id)
        return [] if hand_off is None else self._fail(hand_off, Cancelled("hand-off aborted")) + self._pump(now)

    # -- what the peers say --------------------------------------------------------------------------------------------------

    def live(self, peer: str, epoch: int, now: float) -> list[Action]:
        hand_off = self._by_epoch.get((peer, epoch))
        if hand_off is not None and hand_off.phase is Phase.OPENING:
            hand_off.phase = Phase.SENDING
        return self._pump(now)

    def released(self, peer: str, epoch: int) -> list[Action]:
        """Decode ran its first step. Only a committed hand-off can be released."""
        hand_off = self._by_epoch.get((peer, epoch))
        if hand_off is None or hand_off.phase is not Phase.COMMITTED:
            return []
        self._forget(hand_off)
        return [Closed(hand_off.request_id, None)]

    def revoked(self, peer: str, epoch: int, now: float) -> list[Action]:
        hand_off = self._by_epoch.get((peer, epoch))
        if hand_off is None:  # finished or never begun here: nothing is in flight
            return [LastWriteOut(peer, epoch)]
        return self._fail(hand_off, TransferFailed(f"the receiver revoked epoch {epoch}")) + self._pump(now)

    def peer_lost(self, peer: str, reason: str, now: float) -> list[Action]:
        """The session or connection broke: whatever was in flight there is over (the transport was disconnected)."""
        actions: list[Action] = []
        for hand_off in [h for h in self._hand_offs.values() if h.peer == peer]:
            self._forget(hand_off)
            actions.append(Closed(hand_off.request_id, hand_off.error or MemberLost(f"{peer} is lost: {reason}")))
        return actions + self._pump(now)

    # -- what the transport says ---------------------------------------------------------------------------------------------

    def posted(self, request_id: str, write_id: int, num_bytes: int) -> None:
        """The answer to a Post. To be given before any other event."""
        hand_off = self._hand_offs[request_id]
        hand_off.num_posting -= 1
        hand_off.in_flight[write_id] = num_bytes
        hand_off.num_bytes += num_bytes

    def write_refused(self, request_id: str, error: BatonError, now: float) -> list[Action]:
        """The other answer to a Post."""
        hand_off = self._hand_offs[request_id]
        hand_off.num_posting -= 1
        return self._fail(hand_off, error) + self._pump(now)

    def write_finished(self, request_id: str, write_id: int, succeeded: bool, now: float) -> list[Action]:
        hand_off = self._hand_offs.get(request_id)
        if hand_off is None:
            return []
        hand_off.in_flight.pop(write_id, None)
        if not succeeded and hand_off.phase is not Phase.CLOSING:
            return self._fail(hand_off, TransferFailed(f"a write to {hand_off.peer} failed")) + self._pump(now)
        if hand_off.phase is Phase.COMMITTING and not hand_off.in_flight:
            hand_off.phase = Phase.COMMITTED
            return [HandedOff(request_id, hand_off.num_bytes, now - hand_off.ordered_at), *self._pump(now)]
        if hand_off.phase is Phase.CLOSING and not hand_off.in_flight:
            return self._close(hand_off) + self._pump(now)
        return self._pump(now)

    def tick(self, now: float) -> list[Action]:
        """Renew leases at a third of their length; give up what passed its deadline."""
        actions: list[Action] = []
        for hand_off in list(self._hand_offs.values()):
            waiting = hand_off.order is not None and hand_off.phase in (Phase.OPENING, Phase.SENDING, Phase.COMMITTING)
            if waiting and now - hand_off.ordered_at > self._deadline_s:
                actions += self._fail(hand_off, DeadlineExceeded(f"hand-off to {hand_off.peer} took over {self._deadline_s:g} s"))
            elif hand_off.phase is not Phase.CLOSING and now - hand_off.renewed_at > hand_off.reservation.lease_s / 3:
                hand_off.renewed_at = now
                actions.append(Renew(hand_off.peer, (hand_off.reservation.epoch,)))
        return actions + self._pump(now)

    # -- inside ----------------------------------------------------------------------------------------------------------------

    def _fail(self, hand_off: HandOff, error: BatonError) -> list[Action]:
        if hand_off.phase is not Phase.CLOSING:
            hand_off.phase, hand_off.error = Phase.CLOSING, error
            hand_off.pages.clear()
        return [] if self._is_writing(hand_off) else self._close(hand_off)

    def _close(self, hand_off: HandOff) -> list[Action]:
        self._forget(hand_off)
        epoch = hand_off.reservation.epoch
        return [LastWriteOut(hand_off.peer, epoch), Closed(hand_off.request_id, hand_off.error)]

    def _forget(self, hand_off: HandOff) -> None:
        self._hand_offs.pop(hand_off.request_id, None)
        self._by_epoch.pop((hand_off.peer, hand_off.reservation.epoch), None)

    @staticmethod
    def _is_writing(hand_off: HandOff) -> bool:
        return bool(hand_off.in_flight or hand_off.num_posting)

    def _pump(self, now: float) -> list[Action]:
        """Post what may be posted: a turn each, oldest first, while the bound on bytes in flight allows (one write always may)."""
        actions: list[Action] = []
        budget = self._max_bytes - self.bytes_in_flight
        busy = budget < self._max_bytes
        for hand_off in self._hand_offs.values():
            if hand_off.phase is not Phase.SENDING:
                continue
            count = min(len(hand_off.pages), max(budget // self._page_bytes, 0 if busy else 1))
            if count:
                pages, hand_off.pages = tuple(hand_off.pages[:count]), hand_off.pages[count:]
                last = hand_off.order is not None and not hand_off.pages and not self._is_writing(hand_off)
                actions.append(Post(hand_off.request_id, hand_off.peer, pages, hand_off.order if last else None))
                hand_off.num_posting += 1
                budget -= count * self._page_bytes
                busy = True
                if last:
                    hand_off.phase = Phase.COMMITTING
            elif hand_off.order is not None and not hand_off.pages and not self._is_writing(hand_off):
                hand_off.phase = Phase.COMMITTING
                hand_off.num_posting += 1
                actions.append(Post(hand_off.request_id, hand_off.peer, (), hand_off.order))
        return actions

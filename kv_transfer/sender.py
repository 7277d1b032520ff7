"""The sending half of hand-offs: pure. Events and `now` in, actions out; no socket, clock or memory inside.

    OPENING --live--> SENDING --commit() and all pages out--> COMMITTING --last write out--> COMMITTED --released--> (gone)
        \\________________|______________________|____________________________|  abort, revoked, deadline, peer lost
                         v
                     CLOSING --no write of it under way--> (gone: Closed; LastWriteOut, too, if the peer is not lost)

A *link* is one session with a receiver. It is lost when the session breaks, when a write fails or takes too long, or when the receiver
has vouched for nothing that was sent within `liveness_timeout_s`. A lost link gets no new writes; those under way come to an end within
`drain_s`, or the transport is reset, which ends all links; the next link to that receiver waits for it. That keeps every write of a sender
that was cut off, stopped or slow within `liveness_timeout_s + drain_s` of the last moment at which the receiver still knew it, and the
receiver's quarantine is longer.

Rules: a page is written only while its epoch is live (the receiver said so and has not revoked it); the write with the slot and the
commit is posted only when every earlier write is out; LastWriteOut is said only if all writes succeeded; local pages stay until Closed.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from core.errors import BatonError, Cancelled, MemberLost, TransferFailed
from core.request import Reservation

TURNS = 4
"""One write takes at most this part of the bytes allowed in flight, so that a long prompt does not keep others waiting."""


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


@dataclass(frozen=True, slots=True)
class Flight:
    num_bytes: int
    since: float


@dataclass(slots=True)
class HandOff:
    request_id: str
    peer: str
    reservation: Reservation
    phase: Phase
    renewed_at: float
    pages: list[tuple[int, int]] = field(default_factory=list)
    """(local, remote) still to be written, in order."""
    all_pages: list[tuple[int, int]] = field(default_factory=list)
    """Everything pushed, for the checksums of checked mode."""
    in_flight: dict[int, Flight] = field(default_factory=dict)
    """By write id."""
    order: CommitOrder | None = None
    ordered_at: float = 0.0
    num_bytes: int = 0
    is_released: bool = False
    """Decode has taken over before this side heard that its last write is out."""
    error: BatonError | None = None


@dataclass(slots=True)
class Link:
    vouched_at: float
    """When something was sent that the receiver has answered since: it still knew this session then. inf: it has not begun."""
    lost: BatonError | None = None


@dataclass(frozen=True, slots=True)
class Post:
    """Write these pages (and the slot, with the commit) to the peer."""

    request_id: str
    peer: str
    pages: tuple[tuple[int, int], ...]
    order: CommitOrder | None
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Renew:
    peer: str
    epochs: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LastWriteOut:
    peer: str
    epoch: int


@dataclass(frozen=True, slots=True)
class Drop:
    """The link is lost and none of its writes is under way: disconnect, end the session. The peer's name is not used again."""

    peer: str
    reason: str


@dataclass(frozen=True, slots=True)
class Reset:
    """Writes of a lost link do not end by themselves: reset the transport, then say `was_reset`."""


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


Action = Renew | LastWriteOut | Drop | Reset | HandedOff | Closed


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    page_bytes: int
    slot_bytes: int
    max_bytes_in_flight: int
    deadline_s: float
    """From the order to commit to its landing."""
    write_timeout_s: float
    """Of one write."""
    liveness_timeout_s: float
    drain_s: float


class Sender:
    """All hand-offs of one prefill rank."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._hand_offs: dict[str, HandOff] = {}
        """Whose turn it is to write is first."""
        self._by_epoch: dict[tuple[str, int], HandOff] = {}
        self._links: dict[str, Link] = {}

    @property
    def num_open(self) -> int:
        return len(self._hand_offs)

    @property
    def bytes_in_flight(self) -> int:
        return sum(flight.num_bytes for h in self._hand_offs.values() for flight in h.in_flight.values())

    @property
    def needs_progress(self) -> bool:
        """Whether the transport must be polled: a write is out, or a commit's notification may still be on its way."""
        return any(h.in_flight or h.phase is Phase.COMMITTED for h in self._hand_offs.values())

    def hand_off(self, request_id: str) -> HandOff | None:
        return self._hand_offs.get(request_id)

    def is_over(self, peer: str) -> bool:
        """Whether no write over this link is under way, and none will follow."""
        return peer not in self._links

    def is_usable(self, peer: str) -> bool:
        """Whether a new hand-off may go over this link; if not, it takes a new name (a new session)."""
        link = self._links.get(peer)
        return link is not None and link.lost is None

    # -- orders of the worker ------------------------------------------------------------------------------------------------

    def open(self, request_id: str, peer: str, reservation: Reservation, now: float, waits: bool = False) -> list[Action]:
        """Ask the receiver whether the epoch is live; pages may be pushed meanwhile. A link begins with its first hand-off, or, if that
        `waits`, with `begin`."""
        assert request_id not in self._hand_offs, f"{request_id} is open already"
        link = self._links.setdefault(peer, Link(math.inf if waits else now))
        assert link.lost is None, f"{peer} is lost"
        hand_off = HandOff(request_id, peer, reservation, Phase.OPENING, now)
        self._hand_offs[request_id] = self._by_epoch[peer, reservation.epoch] = hand_off
        return [Renew(peer, (reservation.epoch,))]

    def begin(self, peer: str, now: float) -> None:
        """What this link waited for is over."""
        self._links[peer].vouched_at = now

    def push(self, request_id: str, first_page: int, local_page_ids: Iterable[int]) -> None:
        """Pages first_page, first_page + 1, ... of the sequence are final."""
        hand_off = self._hand_offs.get(request_id)
        if hand_off is None or hand_off.phase is Phase.CLOSING:
            return
        for place, local in enumerate(local_page_ids, first_page):
            assert place < len(hand_off.reservation.page_ids), f"page {place} of {request_id} was not reserved"
            pair = (local, hand_off.reservation.page_ids[place])
            hand_off.pages.append(pair)
            hand_off.all_pages.append(pair)

    def commit(self, request_id: str, order: CommitOrder, now: float) -> None:
        """All pages have been pushed; after them the slot."""
        hand_off = self._hand_offs.get(request_id)
        if hand_off is not None and hand_off.phase is not Phase.CLOSING:
            hand_off.order, hand_off.ordered_at = order, now

    def abort(self, request_id: str) -> list[Action]:
        """Stop writing. Closed follows when nothing is in flight."""
        hand_off = self._hand_offs.get(request_id)
        return [] if hand_off is None else self._fail(hand_off, Cancelled("hand-off aborted"))

    # -- what the peers say --------------------------------------------------------------------------------------------------

    def vouched(self, peer: str, sent_at: float) -> None:
        """The receiver answered, over this session, something that was sent at `sent_at`."""
        link = self._links.get(peer)
        if link is not None and link.lost is None:
            link.vouched_at = max(link.vouched_at, sent_at)

    def live(self, peer: str, epoch: int) -> None:
        hand_off = self._by_epoch.get((peer, epoch))
        if hand_off is not None and hand_off.phase is Phase.OPENING:
            hand_off.phase = Phase.SENDING

    def released(self, peer: str, epoch: int, now: float) -> list[Action]:
        """Decode ran its first step, so everything has landed, even if the transport has not said so yet."""
        hand_off = self._by_epoch.get((peer, epoch))
        if hand_off is None or hand_off.is_released:
            return []
        if hand_off.phase is Phase.COMMITTING:
            hand_off.is_released = True
            return [HandedOff(hand_off.request_id, hand_off.num_bytes, now - hand_off.ordered_at)]
        if hand_off.phase is not Phase.COMMITTED:
            return []
        self._forget(hand_off)
        return [Closed(hand_off.request_id, None)]

    def revoked(self, peer: str, epoch: int) -> list[Action]:
        if not self.is_usable(peer):
            return []  # its writes may have failed; the receiver waits for the end of the session
        hand_off = self._by_epoch.get((peer, epoch))
        if hand_off is None:  # finished or never begun here: nothing is in flight
            return [LastWriteOut(peer, epoch)]
        return self._fail(hand_off, TransferFailed(f"the receiver revoked epoch {epoch}"))

    def peer_lost(self, peer: str, error: BatonError) -> list[Action]:
        """The session broke, or will not be trusted any more. Drop follows when none of its writes is under way."""
        link = self._links.get(peer)
        if link is None or link.lost is not None:
            return []
        link.lost = error
        actions: list[Action] = []
        for hand_off in self._of(peer):
            actions += self._fail(hand_off, error)
        return actions + self._drop_if_quiet(peer)

    # -- what the transport says ---------------------------------------------------------------------------------------------

    def next_post(self) -> Post | None:
        """What to write now, if anything: a turn each, as the bound on bytes in flight allows (one write always may). The answer,
        `posted` or `write_refused`, must be given before anything else."""
        sending = [hand_off for hand_off in self._hand_offs.values() if hand_off.phase is Phase.SENDING]
        if not sending:
            return None
        limits = self._limits
        budget = limits.max_bytes_in_flight - self.bytes_in_flight
        is_idle = budget == limits.max_bytes_in_flight
        most = max(min(budget, limits.max_bytes_in_flight // TURNS) // limits.page_bytes, 1 if is_idle else 0)
        for hand_off in sending:
            count = min(len(hand_off.pages), most)
            is_last = hand_off.order is not None and count == len(hand_off.pages) and not hand_off.in_flight
            if not hand_off.pages and not is_last:
                continue
            num_bytes = count * limits.page_bytes + (limits.slot_bytes if is_last else 0)
            if not num_bytes or (num_bytes > budget and not is_idle):
                return None  # it waits for room, and keeps its turn
            pages = tuple(hand_off.pages[:count])
            return Post(hand_off.request_id, hand_off.peer, pages, hand_off.order if is_last else None, num_bytes)
        return None

    def posted(self, post: Post, write_id: int, now: float) -> None:
        hand_off = self._hand_offs.pop(post.request_id)
        self._hand_offs[post.request_id] = hand_off  # the others' turn
        del hand_off.pages[: len(post.pages)]
        hand_off.in_flight[write_id] = Flight(post.num_bytes, now)
        hand_off.num_bytes += post.num_bytes
        if post.order is not None:
            hand_off.phase = Phase.COMMITTING

    def write_refused(self, post: Post, error: BatonError) -> list[Action]:
        """It may have been started in part: the link is lost, as after a failed write."""
        return self.peer_lost(post.peer, error)

    def write_finished(self, request_id: str, write_id: int, succeeded: bool, now: float) -> list[Action]:
        hand_off = self._hand_offs.get(request_id)
        if hand_off is None or hand_off.in_flight.pop(write_id, None) is None:
            return []
        lost: list[Action] = []
        if not succeeded:
            lost = self.peer_lost(hand_off.peer, TransferFailed(f"a write to {hand_off.peer} failed"))
        if hand_off.in_flight or request_id not in self._hand_offs:
            return lost
        if hand_off.phase is Phase.CLOSING:
            return [*lost, *self._close(hand_off), *self._drop_if_quiet(hand_off.peer)]
        if hand_off.is_released:
            self._forget(hand_off)
            return [*lost, Closed(request_id, None), *self._drop_if_quiet(hand_off.peer)]
        if hand_off.phase is Phase.COMMITTING:
            hand_off.phase = Phase.COMMITTED
            return [HandedOff(request_id, hand_off.num_bytes, now - hand_off.ordered_at)]
        return lost

    def was_reset(self) -> list[Action]:
        """The transport was reset: no write is under way, no link is connected."""
        actions: list[Action] = []
        for hand_off in self._hand_offs.values():
            hand_off.in_flight.clear()
        for peer, link in [found for found in self._links.items() if found[1].vouched_at < math.inf]:
            if link.lost is None:
                actions += self.peer_lost(peer, MemberLost("the transport was reset because another receiver did not answer"))
            else:
                for hand_off in self._of(peer):
                    actions += self._close(hand_off)
                actions += self._drop_if_quiet(peer)
        return actions

    # -- time ------------------------------------------------------------------------------------------------------------------

    def fence(self, now: float) -> list[Action]:
        """To be called before every use of the transport, since this process may have been stopped for any time just before."""
        limits, actions = self._limits, list[Action]()
        silent = [peer for peer, link in self._links.items() if now - link.vouched_at > limits.liveness_timeout_s]
        if not silent:
            return []
        for peer in silent:
            actions += self.peer_lost(peer, MemberLost(f"{peer} is lost: nothing heard for {limits.liveness_timeout_s:g} s"))
        late = limits.liveness_timeout_s + limits.drain_s
        if any(link.lost is not None and now - link.vouched_at > late for link in self._links.values()):
            actions.append(Reset())
        return actions

    def tick(self, now: float) -> list[Action]:
        """Renew leases at a third of their length; give up what passed its deadline."""
        limits, actions = self._limits, list[Action]()
        for hand_off in list(self._hand_offs.values()):
            oldest = min((flight.since for flight in hand_off.in_flight.values()), default=now)
            if now - oldest > limits.write_timeout_s:
                error = TransferFailed(f"a write to {hand_off.peer} took over {limits.write_timeout_s:g} s")
                actions += self.peer_lost(hand_off.peer, error)
            if hand_off.phase in (Phase.CLOSING, Phase.COMMITTED):
                continue  # a receiver that never saw the commit must notice: its lease runs out
            if hand_off.order is not None and now - hand_off.ordered_at > limits.deadline_s:
                actions += self._fail(hand_off, TransferFailed(f"hand-off to {hand_off.peer} took over {limits.deadline_s:g} s"))
            elif now - hand_off.renewed_at > hand_off.reservation.lease_s / 3:
                hand_off.renewed_at = now
                actions.append(Renew(hand_off.peer, (hand_off.reservation.epoch,)))
        return actions

    # -- inside ----------------------------------------------------------------------------------------------------------------

    def _of(self, peer: str) -> list[HandOff]:
        return [hand_off for hand_off in self._hand_offs.values() if hand_off.peer == peer]

    def _fail(self, hand_off: HandOff, error: BatonError) -> list[Action]:
        if hand_off.phase is not Phase.CLOSING:
            hand_off.phase, hand_off.error = Phase.CLOSING, None if hand_off.is_released else error
            hand_off.pages.clear()
        return [] if hand_off.in_flight else self._close(hand_off)

    def _close(self, hand_off: HandOff) -> list[Action]:
        self._forget(hand_off)
        closed = Closed(hand_off.request_id, hand_off.error)
        if self._links[hand_off.peer].lost is not None:
            return [closed]
        return [LastWriteOut(hand_off.peer, hand_off.reservation.epoch), closed]

    def _drop_if_quiet(self, peer: str) -> list[Action]:
        link = self._links.get(peer)
        if link is None or link.lost is None or self._of(peer):
            return []
        del self._links[peer]
        return [Drop(peer, str(link.lost))]

    def _forget(self, hand_off: HandOff) -> None:
        self._hand_offs.pop(hand_off.request_id, None)
        self._by_epoch.pop((hand_off.peer, hand_off.reservation.epoch), None)

"""Reservations: who may write into which pages, and who owns them, from the grant to the last token. Pure.

    RESERVED --renewed--> RECEIVING --committed--> READY --started--> RUNNING --finished--> (gone)
        \\________________________|____________________|________________|  abort
                                  v
                    QUARANTINED --quiesced--> (gone)        only if a write may still land; else gone at once

Pages that a sender has filled are kept when their sequence ends: the next turn of the conversation finds them, and only the missing ones
travel (delta hand-off). Pages that decode has filled are not: another rank's prefill may differ from them in the last bit. Nor are those
of a sequence that came to nothing in a step: they may be why, and another try is to have new ones.

Pages and a slot belong to the request id while it lives and to "quarantine/<epoch>" afterwards, so a page has one owner at any time.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from core.errors import BatonError, DeadlineExceeded, InvalidRequest, Overloaded, TransferFailed
from core.kv_layout import PAGE_TOKENS
from core.prefix import page_digests
from core.request import Request
from engine.scheduler.pages import PageAllocator, SlotAllocator


class State(enum.Enum):
    RESERVED = "reserved"
    RECEIVING = "receiving"
    READY = "ready"
    RUNNING = "running"


@dataclass(slots=True)
class Held:
    request: Request
    epoch: int
    page_ids: tuple[int, ...]
    """Those of the prompt; decode adds more as the sequence grows."""
    num_kept_pages: int
    """The first so many hold what they must already. The sender writes the others."""
    digests: list[bytes]
    """Of the whole pages of the prompt."""
    slot_id: int
    lease_until: float
    deadline: float
    state: State = State.RESERVED
    first_token: int = -1


@dataclass(frozen=True, slots=True)
class Expired:
    held: Held
    error: BatonError


class Reservations:
    """Owner of the rank's pages and slots."""

    def __init__(self, *, num_pages: int, num_slots: int, lease_s: float, expected_output: float) -> None:
        """`expected_output`: share of max_tokens that a sequence is expected to produce; below 1 pages are overcommitted, and
        decode must be able to preempt."""
        self.pages, self.slots = PageAllocator(num_pages), SlotAllocator(num_slots)
        self._lease_s, self._expected_output = lease_s, expected_output
        self._next_epoch = 1
        self._held: dict[str, Held] = {}
        self._by_epoch: dict[int, Held] = {}
        self._quarantined: set[int] = set()

    @property
    def num_quarantined(self) -> int:
        return len(self._quarantined)

    @property
    def waiting_tokens(self) -> int:
        """Tokens of prompts that have not arrived."""
        return sum(len(h.request.token_ids) for h in self._held.values() if h.state in (State.RESERVED, State.RECEIVING))

    def get(self, request_id: str) -> Held | None:
        return self._held.get(request_id)

    def of_epoch(self, epoch: int) -> Held | None:
        return self._by_epoch.get(epoch)

    def _expected_pages(self, request: Request) -> int:
        """One that has run before may have been given up: it is let in only with room for all of it, or it would be the first again."""
        has_run = len(request.token_ids) > request.prompt_len
        output = max(1, round(request.sampling.max_tokens * (1.0 if has_run else self._expected_output)))
        return -(-max(request.prompt_len + output, len(request.token_ids) + 1) // PAGE_TOKENS)

    def reserve(self, request: Request, now: float) -> Held:
        """Grant pages for the prompt and a slot. Raises InvalidRequest for what can never fit, Overloaded for what does not fit now."""
        most = -(-request.max_total_tokens // PAGE_TOKENS)
        if most > self.pages.num_total:
            raise InvalidRequest(
                f"prompt and max_tokens need {most} pages of {PAGE_TOKENS} tokens; this rank has {self.pages.num_total}",
                param="max_tokens",
            )
        if request.request_id in self._held:
            raise InvalidRequest(f"request id {request.request_id!r} is in use", param="request_id")
        promised = sum(max(self._expected_pages(h.request), len(self.pages.owned_by(name))) for name, h in self._held.items())
        quarantined = sum(len(self.pages.owned_by(_quarantine(epoch))) for epoch in self._quarantined)
        count = -(-len(request.token_ids) // PAGE_TOKENS)
        if promised + quarantined + self._expected_pages(request) > self.pages.num_total or count > self.pages.num_free:
            raise Overloaded(f"no {self._expected_pages(request)} pages are free for {request.request_id}")
        slots = self.slots.allocate(request.request_id, 1)
        if slots is None:
            raise Overloaded(f"all {self.slots.num_total} slots are taken")
        digests = page_digests(request.token_ids)  # not before: a refused request asks again within milliseconds, and this takes some
        kept = self.pages.claim(request.request_id, digests)
        missing = self.pages.allocate(request.request_id, count - len(kept))
        assert missing is not None
        epoch, self._next_epoch = self._next_epoch, self._next_epoch + 1
        held = Held(request, epoch, (*kept, *missing), len(kept), digests, slots[0], now + self._lease_s, now + request.deadline_s)
        self._held[request.request_id] = self._by_epoch[epoch] = held
        return held

    def renewed(self, epoch: int, now: float) -> None:
        held = self._by_epoch.get(epoch)
        if held is not None:
            held.lease_until = now + self._lease_s
            if held.state is State.RESERVED:
                held.state = State.RECEIVING

    def committed(self, epoch: int, first_token: int) -> Held | None:
        """The bytes are here. None if the reservation was aborted meanwhile."""
        held = self._by_epoch.get(epoch)
        if held is None:
            return None
        assert held.state in (State.RESERVED, State.RECEIVING), f"{epoch=} committed in state {held.state}"
        held.state, held.first_token = State.READY, first_token
        self.pages.holds(held.request.request_id, held.digests)
        return held

    def started(self, request_id: str) -> None:
        """First step taken: nothing of the hand-off is outstanding."""
        held = self._held[request_id]
        held.state = State.RUNNING
        self._by_epoch.pop(held.epoch, None)

    def end(self, request_id: str, *, is_suspect: bool = False) -> Held | None:
        """Finished or aborted, from any state. Before RUNNING the pages go into quarantine: the caller has the receiver revoke the
        epoch and calls `quiesced` when it says so. `is_suspect`: what the pages hold is not to be kept. None if unknown."""
        held = self._held.pop(request_id, None)
        if held is None:
            return None
        if is_suspect:
            self.pages.holds(request_id, ())
        if held.state is State.RUNNING:
            self.pages.free(request_id)
            self.slots.free(request_id)
        else:
            del self._by_epoch[held.epoch]
            self._quarantined.add(held.epoch)
            self.pages.rename(request_id, _quarantine(held.epoch))
            self.slots.rename(request_id, _quarantine(held.epoch))
        return held

    def quiesced(self, epoch: int) -> None:
        """No write for this epoch can land any more."""
        if epoch in self._quarantined:
            self._quarantined.remove(epoch)
            self.pages.free(_quarantine(epoch))
            self.slots.free(_quarantine(epoch))

    def expired(self, now: float) -> list[Expired]:
        """Reservations whose lease or deadline has passed; the caller ends them."""
        late = []
        for held in self._held.values():
            if held.state in (State.RESERVED, State.RECEIVING) and now > held.lease_until:
                late.append(Expired(held, TransferFailed(f"the prefill rank was silent for {self._lease_s:g} s")))
            elif now > held.deadline:
                late.append(Expired(held, DeadlineExceeded(f"the request took over {held.request.deadline_s:g} s")))
        return late

    def check_integrity(self) -> None:
        """Assert that every page and slot is free or owned by a living request or a quarantined epoch."""
        self.pages.check_integrity()
        self.slots.check_integrity()
        allowed = set(self._held) | {_quarantine(epoch) for epoch in self._quarantined}
        for allocator in (self.pages, self.slots):
            strangers = set(allocator.owners()) - allowed
            assert not strangers, f"{type(allocator).__name__}: ids owned by {sorted(strangers)}"


def _quarantine(epoch: int) -> str:
    return f"quarantine/{epoch}"

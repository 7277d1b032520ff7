"""Which sequences take the next decode step, and who must give way when pages run out."""

from __future__ import annotations

from dataclasses import dataclass

from core.kv_layout import PAGE_TOKENS
from engine.batch import Chunk
from engine.scheduler.pages import PageAllocator
from engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class DecodePlan:
    chunks: list[Chunk]
    preempted: list[Sequence]
    """Youngest first. Their pages are taken back already; the caller frees their slots and has the requests run again."""


class DecodePlanner:
    """Runs every running sequence, oldest first, up to `max_running`; takes a page for each that crosses into a new one.

    When no page is free the youngest sequence of all gives way, at worst the one in need itself. The oldest is never preempted while
    another one holds pages, so there is always progress.

    A step may be planned while the one before it computes: sequences that then have all the tokens they may are passed over. What a step
    under way writes to is nobody else's, so who leads must see first that it `has_room`.
    """

    def __init__(self, *, max_running: int) -> None:
        assert max_running >= 1, f"{max_running=}"
        self._max_running = max_running

    def plan(self, running: list[Sequence], pages: PageAllocator, budget: int | None = None) -> DecodePlan:
        """running: oldest first, each with exactly one token to compute, or none but the one that is on its way. Moves pages in the
        allocator and in the sequences. `budget`: fewer sequences than `max_running` for this step."""
        chunks: list[Chunk] = []
        preempted: list[Sequence] = []
        alive = [sequence for sequence in running if sequence.num_steps_left > 0]
        while len(chunks) < min(len(alive), self._limit(budget)):
            sequence = alive[len(chunks)]
            assert sequence.num_remaining in (0, 1), f"{sequence.request_id}: {sequence.num_remaining} tokens to compute"
            missing = _missing(sequence)
            while missing > pages.num_free and alive[-1] is not sequence:
                preempted.append(_preempt(alive.pop(), pages))
            ids = pages.allocate(sequence.request_id, missing)
            if ids is None:
                preempted.append(_preempt(alive.pop(), pages))
                break
            sequence.page_ids += ids
            chunks.append(Chunk(sequence, 1, "last"))
        return DecodePlan(chunks, preempted)

    def has_room(self, running: list[Sequence], pages: PageAllocator, budget: int | None = None) -> bool:
        """Whether `plan` would preempt nobody."""
        alive = [sequence for sequence in running if sequence.num_steps_left > 0]
        return sum(_missing(sequence) for sequence in alive[: self._limit(budget)]) <= pages.num_free

    def _limit(self, budget: int | None) -> int:
        return self._max_running if budget is None else min(budget, self._max_running)


def _missing(sequence: Sequence) -> int:
    """Pages that its next token needs."""
    return max(0, sequence.num_computed // PAGE_TOKENS + 1 - len(sequence.page_ids))


def _preempt(sequence: Sequence, pages: PageAllocator) -> Sequence:
    pages.free(sequence.request_id)
    sequence.page_ids = []
    return sequence

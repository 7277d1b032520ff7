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
    """Youngest first. Their pages are still theirs: the caller frees them and has the requests run again."""


class DecodePlanner:
    """Runs every running sequence, oldest first, up to `max_running`; takes a page for each that crosses into a new one."""

    def __init__(self, *, max_running: int) -> None:
        assert max_running >= 1, f"{max_running=}"
        self._max_running = max_running

    def plan(self, running: list[Sequence], pages: PageAllocator) -> DecodePlan:
        """running: oldest first, each with exactly one token to compute. Allocates pages to their sequences."""
        chunks: list[Chunk] = []
        preempted: list[Sequence] = []
        candidates = running[: self._max_running]
        budget = pages.num_free
        for place, sequence in enumerate(candidates):
            if sequence in preempted:
                continue
            need = sequence.num_computed // PAGE_TOKENS + 1 - len(sequence.page_ids)
            while need > budget:
                victims = [s for s in reversed(candidates[place + 1 :]) if s not in preempted]
                if not victims:
                    break
                preempted.append(victims[0])
                budget += len(victims[0].page_ids)
            if need > budget:
                preempted.append(sequence)
                continue
            if need > pages.num_free:
                continue  # its turn comes when the victims' pages are back
            if need > 0:
                ids = pages.allocate(sequence.request_id, need)
                assert ids is not None
                sequence.page_ids += ids
                budget -= need
            chunks.append(Chunk(sequence, 1, "last"))
        kept = [chunk for chunk in chunks if chunk.sequence not in preempted]
        return DecodePlan(kept, preempted)

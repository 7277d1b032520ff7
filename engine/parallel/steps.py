"""When the ranks of a group take a step, and how large it may be. Pure: votes in, decisions out.

    rank 1   |-- step 7 --------|            |-- step 8 ...
    rank 0   |-- step 7 ------------------|  |-- step 8 ...
             ^ both vote for step 8, as they begin step 7; rank 0 counts, and says go while they compute

Each rank votes with the tokens that it wants to compute in the next step. When all have voted and one wants any, all take the step,
those without work with an empty batch. When nobody wants any nothing is said and all sleep, until one of them votes again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Go:
    """All ranks are to take this step now, each with at most `budget` tokens."""

    step: int
    budget: int
    is_change: bool = False
    """Before this step all ranks put in force what they have prepared (a new placement of a layer's experts)."""


class StepBoard:
    """Owner of the votes for the next step. On rank 0."""

    def __init__(self, size: int, budget_of: Callable[[Sequence[int]], int]) -> None:
        """`budget_of(wanted)`: from the tokens that each rank wants, at least one of them above 0, to the most that each may take."""
        self.step = 0
        """The next one; those before are decided."""
        self._budget_of = budget_of
        self._wanted: list[int | None] = [None] * size
        self._waiting_since: float | None = None
        """Since when a rank has work for the next step that cannot begin."""

    def vote(self, rank: int, step: int, wanted: int, now: float) -> Go | None:
        """A rank's newest wish for a step replaces its last one. One for a decided step comes too late, and says nothing new."""
        assert step <= self.step, f"rank {rank} votes for step {step}, and {self.step} is the next"
        if step < self.step:
            return None
        self._wanted[rank] = wanted
        if self._waiting_since is None and wanted:
            self._waiting_since = now
        votes = [vote for vote in self._wanted if vote is not None]
        if not any(votes):
            self._waiting_since = None
        if len(votes) < len(self._wanted) or not any(votes):
            return None
        decided = Go(self.step, self._budget_of(votes))
        self.step += 1
        self._wanted = [None] * len(self._wanted)
        self._waiting_since = None
        return decided

    def overdue(self, now: float, limit_s: float) -> tuple[int, ...]:
        """The ranks without a vote, if they have kept another one waiting for longer than the limit."""
        if self._waiting_since is None or now - self._waiting_since <= limit_s:
            return ()
        return tuple(rank for rank, vote in enumerate(self._wanted) if vote is None)


def even_budget(wanted: Sequence[int], chunk_tokens: int) -> int:
    """Prefill: the mean of what the busy ranks want, at least a quarter of a chunk.

    A step lasts as long as its longest chunk. So that a rank with a short prompt does not wait for another's whole chunk, the long prompt
    goes on in smaller ones meanwhile, and is hardly slower for it: its steps are shorter, too.
    """
    busy = [tokens for tokens in wanted if tokens]
    return min(chunk_tokens, max(-(-sum(busy) // len(busy)), -(-chunk_tokens // 4)))


def batch_bucket(wanted: Sequence[int], max_running: int) -> int:
    """Decode: the power of two that covers the fullest rank, or `max_running`."""
    return min(max_running, 1 << (max(wanted) - 1).bit_length())

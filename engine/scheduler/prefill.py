"""Which prompt tokens to compute in the next prefill step."""

from __future__ import annotations

from core.kv_layout import PAGE_TOKENS
from engine.batch import Chunk
from engine.sequence import Sequence

SCORED_TOKENS = 1024
"""In a step, of prompts whose log-probabilities are wanted: the logits of each take 0.5 MB with a vocabulary of 129,280."""


class PrefillPlanner:
    """Packs chunks of several prompts into a step of at most `chunk_tokens` tokens.

        step of 256    [ oldest: at least 128 | least left to compute | second least | ... | what is left: oldest again ]

    Half of a step belongs to the oldest prompt, so each one's turn comes; the other half to those that it finishes soonest, so a
    short prompt waits for no long one. Among equals this is first come, first served. Of prompts whose log-probabilities are wanted no more
    than SCORED_TOKENS are in a step, shared out in the same way.
    """

    def __init__(self, *, chunk_tokens: int, max_sequences: int) -> None:
        """`max_sequences`: prompts in one step at most."""
        assert chunk_tokens >= 1 and max_sequences >= 1, f"{chunk_tokens=} {max_sequences=}"
        self._chunk_tokens = chunk_tokens
        self._max_sequences = max_sequences

    def plan(self, sequences: list[Sequence], budget: int | None = None) -> list[Chunk]:
        """sequences: oldest first; those with nothing to compute are passed over. Chunks come in the same order. `budget`: fewer tokens
        than `chunk_tokens` for this step."""
        tokens = self._chunk_tokens if budget is None else min(budget, self._chunk_tokens)
        chosen = [s for s in sequences if s.num_remaining > 0]
        if not chosen:
            return []
        oldest = chosen[0]
        others = sorted(chosen[1:], key=lambda s: s.num_remaining)[: self._max_sequences - 1]
        left, scored_left = tokens, min(tokens, SCORED_TOKENS)
        lengths = {id(sequence): 0 for sequence in chosen}

        def give(sequence: Sequence, share: int = 1) -> None:
            """Up to one part in `share` of what is left."""
            nonlocal left, scored_left
            most = -(-left // share)
            if _is_scored(sequence):
                most = min(most, -(-scored_left // share))
            length = min(sequence.num_remaining - lengths[id(sequence)], most)
            lengths[id(sequence)] += length
            left -= length
            scored_left -= length if _is_scored(sequence) else 0

        give(oldest, 2 if others else 1)
        for sequence in others:
            give(sequence)
        give(oldest)
        return [self._chunk(s, lengths[id(s)]) for s in chosen if lengths[id(s)]]

    def _chunk(self, sequence: Sequence, length: int) -> Chunk:
        """Cut at the page border before its end if that gives up little: the page can then leave a step earlier."""
        is_last = length == sequence.num_remaining
        past_border = (sequence.num_computed + length) % PAGE_TOKENS
        if not is_last and past_border < length and past_border <= self._chunk_tokens // 8:
            length -= past_border
        if _is_scored(sequence):
            return Chunk(sequence, length, "all")
        return Chunk(sequence, length, "last" if is_last else "none")


def _is_scored(sequence: Sequence) -> bool:
    return sequence.request.sampling.num_prompt_logprobs is not None

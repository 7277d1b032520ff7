"""Which prompt tokens to compute in the next prefill step."""

from __future__ import annotations

from core.kv_layout import PAGE_TOKENS
from engine.batch import Chunk
from engine.sequence import Sequence


class PrefillPlanner:
    """Packs chunks of several prompts into a step of at most `chunk_tokens` tokens.

    First come, first served, but a long prompt does not keep short ones waiting: every sequence first gets an equal share of the
    step, and what is left goes to the oldest. Chunks end at page borders where that costs nothing, so that pages can leave early.
    """

    def __init__(self, *, chunk_tokens: int, max_sequences: int) -> None:
        assert chunk_tokens >= 1 and max_sequences >= 1, f"{chunk_tokens=} {max_sequences=}"
        self._chunk_tokens = chunk_tokens
        self._max_sequences = max_sequences

    def plan(self, sequences: list[Sequence]) -> list[Chunk]:
        """sequences: those with tokens to compute, oldest first. Empty in, empty out."""
        chosen = [s for s in sequences if s.num_remaining > 0][: min(self._max_sequences, self._chunk_tokens)]
        if not chosen:
            return []
        share = self._chunk_tokens // len(chosen)
        lengths = [min(sequence.num_remaining, share) for sequence in chosen]
        left = self._chunk_tokens - sum(lengths)
        for place, sequence in enumerate(chosen):
            more = min(left, sequence.num_remaining - lengths[place])
            lengths[place] += more
            left -= more
        return [self._chunk(sequence, length) for sequence, length in zip(chosen, lengths, strict=True)]

    def _chunk(self, sequence: Sequence, length: int) -> Chunk:
        if length == sequence.num_remaining:
            return Chunk(sequence, length, "all" if _wants_all_logits(sequence) else "last")
        end = sequence.num_computed + length
        aligned = end - end % PAGE_TOKENS
        if aligned - sequence.num_computed >= PAGE_TOKENS // 2:
            length = aligned - sequence.num_computed
        return Chunk(sequence, length, "all" if _wants_all_logits(sequence) else "none")


def _wants_all_logits(sequence: Sequence) -> bool:
    return sequence.request.sampling.num_prompt_logprobs is not None

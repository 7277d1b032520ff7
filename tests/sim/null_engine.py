"""A runner without a model and without tensors: what a page holds is a number that stands for the tokens it covers.

Every step first checks that pages and slot are those of the sequence's tokens, so bytes that were not transferred, or were written by
somebody else, are noticed at the next step of whom they hurt.
"""

from __future__ import annotations

import types
from typing import Any

from core.request import SamplingParams
from engine.batch import Chunk
from engine.runner import ChunkResult, Launched, finish_reason_of
from engine.sequence import Sequence

PAGE_TOKENS = 4
"""In the simulation; small, so that sequences have several pages and few tokens."""

VOCAB_SIZE, EOS = 97, 1


class SimLayout:
    page_bytes, slot_bytes = 100, 40

    def to_json(self) -> str:
        return "simulated"


def page_contents(token_ids: list[int]) -> list[int]:
    """What the pages of a sequence hold when all these tokens are computed."""
    found, before = [], 7
    for start in range(0, len(token_ids), PAGE_TOKENS):
        before = hash((before, *token_ids[start : start + PAGE_TOKENS]))
        found.append(before)
    return found


def next_token(token_ids: list[int], sampling: SamplingParams) -> int:
    return hash((sampling.seed, *token_ids)) % VOCAB_SIZE


def continuation(prompt: tuple[int, ...], sampling: SamplingParams) -> list[int]:
    """The whole output that a request with this prompt must get."""
    ids = list(prompt)
    while len(ids) - len(prompt) < sampling.max_tokens:
        ids.append(next_token(ids, sampling))
        if ids[-1] == EOS:
            break
    return ids[len(prompt) :]


class SimRunner:
    """Its memory is two lists. `busy_s`: how long the steps taken since it was last looked at would have taken. With `overlap` a step may
    be launched before the last one is collected. Memory is read and written when a step is collected, as late as may be."""

    vocab_size, max_model_len = VOCAB_SIZE, 1000
    layout: Any = SimLayout()

    def __init__(self, num_pages: int, num_slots: int, step_s: float, overlap: bool) -> None:
        self.pages: list[int | None] = [None] * num_pages
        self.slots: list[int | None] = [None] * num_slots
        self.arena = types.SimpleNamespace(pages=self.pages, slots=self.slots)
        self._step_s, self._overlap = step_s, overlap
        self.busy_s = 0.0

    def clear_slot(self, slot_id: int) -> None:
        self.slots[slot_id] = 0

    def arrived(self, page_ids: tuple[int, ...], slot_id: int) -> None:
        """They lie where they are read."""

    def step(self, chunks: list[Chunk], budget: int = 0) -> list[ChunkResult]:
        return self.collect(self.launch(chunks, budget))

    def launch(self, chunks: list[Chunk], budget: int = 0) -> Launched:
        for chunk in chunks:
            chunk.sequence.num_computed = chunk.end
        return Launched(chunks)

    def may_lead(self, launched: Launched) -> bool:
        return self._overlap

    def collect(self, launched: Launched) -> list[ChunkResult]:
        self.busy_s += self._step_s
        results = [self._run(chunk.sequence, chunk.start, chunk.end) for chunk in launched.chunks]
        return [result for result in results if result is not None]

    def _run(self, sequence: Sequence, start: int, end: int) -> ChunkResult | None:
        ids = sequence.token_ids
        if start:
            held = [self.pages[page] for page in sequence.page_ids[: -(-start // PAGE_TOKENS)]]
            assert held == page_contents(ids[:start]), f"{sequence.request_id} found foreign bytes in its pages {sequence.page_ids}"
        slot = self.slots[sequence.slot_id]
        expected = hash(tuple(ids[:start])) if start else 0
        assert slot == expected, f"{sequence.request_id} found a foreign state in slot {sequence.slot_id}"
        for page, content in zip(sequence.page_ids, page_contents(ids[:end]), strict=False):
            self.pages[page] = content
        self.slots[sequence.slot_id] = hash(tuple(ids[:end]))
        if sequence.finish_reason is not None:
            return None
        if end < len(ids):
            return ChunkResult(sequence)
        ids.append(next_token(ids, sequence.request.sampling))
        sequence.finish_reason = finish_reason_of(sequence, EOS)
        return ChunkResult(sequence, ids[-1])

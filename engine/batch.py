"""Batch: the tensors that one forward pass needs, built from (sequence, length) chunks. An argument, never a global.

Shape suffixes: T tokens of all chunks, S sequences (chunks), P most pages of a sequence, R rows whose logits are wanted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from core.kv_layout import PAGE_TOKENS
from engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Chunk:
    """Run tokens [num_computed, num_computed + length) of a sequence through the model."""

    sequence: Sequence
    length: int
    logits: str = "last"
    """Which rows of the chunk need logits: "last", "all" or "none"."""

    @property
    def start(self) -> int:
        return self.sequence.num_computed


@dataclass(frozen=True, slots=True)
class Batch:
    token_ids_T: torch.Tensor
    """int64."""
    positions_T: torch.Tensor
    """int64, absolute 0-based position of each token in its sequence."""
    starts_S: tuple[int, ...]
    """Position of each chunk's first token."""
    lengths_S: tuple[int, ...]
    """Tokens of each chunk, >= 1; T is their sum."""
    slot_ids_S: torch.Tensor
    """int64."""
    page_table_SP: torch.Tensor
    """int64 page ids, -1 beyond a sequence's pages."""
    logits_rows_R: torch.Tensor
    """int64 rows of T."""

    @property
    def is_decode(self) -> bool:
        """Every chunk is one token: the decode path of attention serves it."""
        return all(length == 1 for length in self.lengths_S)


def build_batch(chunks: list[Chunk], device: torch.device | str = "cpu") -> Batch:
    """Each chunk's sequence must own a slot and pages for all its tokens up to the chunk's end."""
    token_ids: list[int] = []
    positions: list[int] = []
    rows: list[int] = []
    for chunk in chunks:
        start, end = chunk.start, chunk.start + chunk.length
        sequence = chunk.sequence
        assert chunk.length >= 1 and end <= len(sequence.token_ids), f"{start=} {end=} of {len(sequence.token_ids)}"
        assert sequence.slot_id >= 0 and len(sequence.page_ids) * PAGE_TOKENS >= end, f"{sequence.request_id}: no room"
        first = len(token_ids)
        token_ids += sequence.token_ids[start:end]
        positions += range(start, end)
        rows += {"last": range(len(token_ids) - 1, len(token_ids)), "all": range(first, len(token_ids)), "none": range(0)}[chunk.logits]
    most_pages = max((len(chunk.sequence.page_ids) for chunk in chunks), default=0)
    table = [chunk.sequence.page_ids + [-1] * (most_pages - len(chunk.sequence.page_ids)) for chunk in chunks]

    def ints(values: list[int] | list[list[int]]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    return Batch(
        token_ids_T=ints(token_ids),
        positions_T=ints(positions),
        starts_S=tuple(chunk.start for chunk in chunks),
        lengths_S=tuple(chunk.length for chunk in chunks),
        slot_ids_S=ints([chunk.sequence.slot_id for chunk in chunks]),
        page_table_SP=ints(table).reshape(len(chunks), most_pages),
        logits_rows_R=ints(rows),
    )

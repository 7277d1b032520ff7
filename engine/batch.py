"""Batch: the tensors that one forward pass needs, built from (sequence, length) chunks. An argument, never a global.

Shape suffixes: T tokens of all chunks, S sequences (chunks), P most pages of a sequence, R rows whose logits are wanted.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from core.kv_layout import PAGE_TOKENS
from engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Chunk:
    """Run tokens [start, start + length) of a sequence through the model."""

    sequence: Sequence
    length: int
    logits: str = "last"
    """Which rows of the chunk need logits: "last", "all" or "none"."""
    start: int = field(init=False)
    """The sequence's num_computed when the chunk was made."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "start", self.sequence.num_computed)

    @property
    def end(self) -> int:
        return self.start + self.length


@dataclass(frozen=True, slots=True)
class TokenPlaces:
    """Where a step's tokens stand in their sequences, and where the sequences' memory lies.

    A chunk is a run of rows with consecutive positions, so the token at position p' of row t's chunk is row t - (p - p').
    """

    positions_T: torch.Tensor
    """int64, absolute 0-based position; -1 for a row that only fills up a batch: nothing is stored for it."""
    sequences_T: torch.Tensor
    """int64, non-decreasing: the row of the page table, one a chunk."""
    starts_T: torch.Tensor
    """int64 position of the first token of the row's chunk: what lies before it is in the sequence's slot."""
    slots_T: torch.Tensor
    """int64 slot of the row's sequence."""
    page_table_SP: torch.Tensor
    """int32 page ids, -1 beyond a sequence's pages."""
    is_decode: bool
    """Every chunk is one token."""

    def pages_of(self, rows_N: torch.Tensor, numbers_N: torch.Tensor, per_page: int) -> torch.Tensor:
        """int64 [N] page ids that hold entries `numbers` of the sequences of rows `rows`, `per_page` entries a page."""
        return self.page_table_SP[self.sequences_T[rows_N], numbers_N // per_page].long()

    def rows_of(self, numbers_TK: torch.Tensor, per_page: int) -> torch.Tensor:
        """Entry numbers of each token's sequence (int32 [T, K], -1 unused) -> rows page * per_page + r of the pool, int32 [T, K]."""
        used = numbers_TK.clamp(min=0).long()
        pages = self.page_table_SP[self.sequences_T[:, None], used // per_page]
        return torch.where(numbers_TK >= 0, pages * per_page + used % per_page, -1).int()

    def of_rows(self, rows: slice) -> TokenPlaces:
        """The same for some rows; the page table stays whole."""
        tokens = (self.positions_T[rows], self.sequences_T[rows], self.starts_T[rows], self.slots_T[rows])
        return TokenPlaces(*tokens, self.page_table_SP, self.is_decode)

    def is_among_last(self, count: int) -> torch.Tensor:
        """bool [T]: the row is one of the last `count` of its chunk, and no filler."""
        later = torch.full_like(self.sequences_T, -1)
        later[:-count] = self.sequences_T[count:]
        return (later != self.sequences_T) & (self.positions_T >= 0)


@dataclass(frozen=True, slots=True)
class Batch:
    token_ids_T: torch.Tensor
    """int64."""
    places: TokenPlaces
    starts_S: tuple[int, ...]
    """Position of each chunk's first token."""
    lengths_S: tuple[int, ...]
    """Tokens of each chunk, >= 1; T is their sum."""
    longest: int
    """Bound of the tokens of any sequence, this step's included."""
    logits_rows_R: torch.Tensor | None
    """int64 rows of T whose logits are wanted; None: all of them."""


@dataclass(frozen=True, slots=True)
class Feedback:
    """Where a step finds the tokens that the host does not know yet."""

    tokens: torch.Tensor
    """int64, one a chunk of the step before; -1 for one that has failed: what follows it is for nothing."""
    rows: list[int]
    """For each chunk of this step, the chunk before whose token is its last one; -1: the host knows all its tokens."""

    def tokens_of_rows(self) -> list[int]:
        """Waits for the step before."""
        tokens = self.tokens.tolist()
        return [-1 if row < 0 else tokens[row] for row in self.rows]


def build_batch(chunks: list[Chunk], device: torch.device | str = "cpu", feedback: Feedback | None = None) -> Batch:
    """Each chunk's sequence must own a slot and pages for all its tokens up to the chunk's end."""
    token_ids: list[int] = []
    positions: list[int] = []
    rows: list[int] = []
    fed: list[tuple[int, int]] = []
    for place, chunk in enumerate(chunks):
        start, end = chunk.start, chunk.end
        sequence = chunk.sequence
        is_fed = feedback is not None and feedback.rows[place] >= 0
        assert chunk.length >= 1 and end <= len(sequence.token_ids) + is_fed, f"{start=} {end=} of {len(sequence.token_ids)}"
        assert sequence.slot_id >= 0 and len(sequence.page_ids) * PAGE_TOKENS >= end, f"{sequence.request_id}: no room"
        first = len(token_ids)
        token_ids += sequence.token_ids[start:end]
        if feedback is not None and is_fed:
            fed.append((len(token_ids), feedback.rows[place]))
            token_ids.append(0)
        positions += range(start, end)
        rows += {"last": range(len(token_ids) - 1, len(token_ids)), "all": range(first, len(token_ids)), "none": range(0)}[chunk.logits]
    most_pages = max((len(chunk.sequence.page_ids) for chunk in chunks), default=0)
    table = [chunk.sequence.page_ids + [-1] * (most_pages - len(chunk.sequence.page_ids)) for chunk in chunks]

    def ints(values: list[int] | list[list[int]], dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype).to(device)

    lengths = torch.tensor([chunk.length for chunk in chunks], dtype=torch.int64)

    def per_token(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64).repeat_interleave(lengths).to(device)

    places = TokenPlaces(
        positions_T=ints(positions),
        sequences_T=per_token(list(range(len(chunks)))),
        starts_T=per_token([chunk.start for chunk in chunks]),
        slots_T=per_token([chunk.sequence.slot_id for chunk in chunks]),
        page_table_SP=ints(table, torch.int32).reshape(len(chunks), most_pages),
        is_decode=all(chunk.length == 1 for chunk in chunks),
    )
    token_ids_T = ints(token_ids)
    if feedback is not None and fed:
        into, source = zip(*fed, strict=True)
        token_ids_T[list(into)] = feedback.tokens[list(source)].clamp(min=0)
    return Batch(
        token_ids_T=token_ids_T,
        places=places,
        starts_S=tuple(chunk.start for chunk in chunks),
        lengths_S=tuple(chunk.length for chunk in chunks),
        longest=max((chunk.end for chunk in chunks), default=0),
        logits_rows_R=ints(rows),
    )

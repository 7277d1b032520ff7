"""Which rows the tokens of a prefill step attend to: those of its sequences stand one after the other, as each layer gathers them.

    [ the sequences' own tokens | the up to 127 tokens before each chunk | the entries of each sequence ]

Sequences with much before their chunks are taken in several runs, so that what is gathered at once stays small. Made once a step; only
what the indexer chooses differs from layer to layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from engine.batch import Batch
from engine.cache.layout import C4_ROWS_PER_PAGE, C128_ROWS_PER_PAGE, WINDOW_ROWS
from engine.ops.registry import BoundOps

PER_PAGE = {4: C4_ROWS_PER_PAGE, 128: C128_ROWS_PER_PAGE}
"""By ratio."""

ENTRIES_AT_ONCE = 65_536
"""Ratio-4 entries that are gathered together, unless one sequence has more. They take 1 KB each in bf16, twice while they are put behind
the window: beside the one longest sequence that `workspace.py` measures they must fit into its margin."""


@dataclass(frozen=True, slots=True)
class PromptRows:
    """Of a run of sequences."""

    tokens: slice
    """The rows of the step that are theirs, T of them; all else here counts from the first."""
    before: tuple[torch.Tensor, torch.Tensor]
    """int64 [N], slots and rows of the window's pool: what the sequences' own rows will overwrite there."""
    entries: dict[int, tuple[torch.Tensor, torch.Tensor]]
    """By ratio: int64 [E], pages and rows of the entries' pool, those that the step closes among them."""
    window: torch.Tensor
    """int32 [T, 128]: the rows of each token's window, -1 unused."""
    base: torch.Tensor
    """int32 [T]: the row of entry 0 of the token's sequence, in ratio-4 layers."""
    indices: dict[int, torch.Tensor]
    """By ratio, 0 and 128: int32 [T, K], all rows that each token attends to there, -1 unused."""


def prompt_rows(batch: Batch, dense: torch.Tensor, ops: BoundOps) -> tuple[PromptRows, ...]:
    """For all sequences, in order. dense: int32 [T, N], the entries that each token sees in ratio-128 layers, -1 unused."""
    found, first = [], 0
    for run in runs_of([(start + length) // 4 for start, length in zip(batch.starts_S, batch.lengths_S, strict=True)]):
        tokens = slice(first, first + sum(batch.lengths_S[run]))
        found.append(_of_run(batch, run, tokens, dense[tokens], ops))
        first = tokens.stop
    return tuple(found)


def runs_of(entries: Sequence[int]) -> list[slice]:
    """Sequences with so many entries each -> those that are taken together: as many, in order, as ENTRIES_AT_ONCE allows, one at least."""
    runs, first, total = [], 0, 0
    for number, count in enumerate(entries):
        if number > first and total + count > ENTRIES_AT_ONCE:
            runs.append(slice(first, number))
            first, total = number, 0
        total += count
    return [*runs, slice(first, len(entries))]


def _of_run(batch: Batch, run: slice, of_tokens: slice, dense: torch.Tensor, ops: BoundOps) -> PromptRows:
    places, device = batch.places.of_rows(of_tokens), batch.token_ids_T.device
    tokens, starts, lengths = of_tokens.stop - of_tokens.start, batch.starts_S[run], batch.lengths_S[run]
    sequences, table = places.sequences_T - run.start, places.page_table_SP[run]
    kept = [min(start, WINDOW_ROWS - 1) for start in starts]
    closed = {ratio: [(start + length) // ratio for start, length in zip(starts, lengths, strict=True)] for ratio in PER_PAGE}
    num_kept = sum(kept)
    # The position 0 of a sequence would be this row, were the tokens before its chunk all there.
    before_base = [tokens + first - start + number for first, start, number in zip(_firsts(kept), starts, kept, strict=True)]
    bases = [[tokens + num_kept + first for first in _firsts(closed[ratio])] for ratio in PER_PAGE]
    columns = torch.tensor([_firsts(lengths), kept, before_base, *closed.values(), *bases], dtype=torch.int64)
    first_row, kept_S, before_S, closed4, closed128, base4, base128 = _to(columns, device)

    number = torch.repeat_interleave(kept_S, output_size=num_kept)
    position = torch.arange(tokens, tokens + num_kept, device=device) - before_S[number]
    before = places.slots_T[first_row[number]], position % WINDOW_ROWS

    row, column = torch.arange(tokens, device=device)[:, None], torch.arange(WINDOW_ROWS, device=device) - (WINDOW_ROWS - 1)
    position = places.positions_T[:, None] + column
    rows = torch.where(position >= places.starts_T[:, None], row + column, position + before_S[sequences, None])
    window = torch.where(position >= 0, rows, -1).int()

    entries = {}
    for (ratio, per_page), counts, base in zip(PER_PAGE.items(), (closed4, closed128), (base4, base128), strict=True):
        count = sum(closed[ratio])
        number = torch.repeat_interleave(counts, output_size=count)
        entry = torch.arange(tokens + num_kept, tokens + num_kept + count, device=device) - base[number]
        entries[ratio] = table[number, entry // per_page].long(), entry % per_page
    base4, base128 = base4[sequences].int(), base128[sequences].int()
    indices = {0: window, 128: ops.prompt_indices(window, dense, base128)}
    return PromptRows(of_tokens, before, entries, window, base4, indices)


def _firsts(counts: Sequence[int]) -> list[int]:
    """Where each begins."""
    return [0, *accumulate(counts)][:-1]


def _to(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Without waiting for what the device does now."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values

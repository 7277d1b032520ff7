"""What all layers of a step need to know about its tokens: angles, what is visible, and where rows lie."""

from __future__ import annotations

from typing import NamedTuple

import torch

from engine.batch import TokenPlaces
from engine.cache.layout import C128_ROWS_PER_PAGE, WINDOW_ROWS
from engine.model.rope import rotation
from engine.ops import requires
from engine.ops.registry import Impl, Op


class StepTables(NamedTuple):
    """Cosines and sines are fp32 [T, rope / 2]."""

    main_cos: torch.Tensor
    """Of each token's position, by the frequencies of layers without entries."""
    main_sin: torch.Tensor
    token_cos: torch.Tensor
    """The same by those of layers with entries."""
    token_sin: torch.Tensor
    block4_cos: torch.Tensor
    """Of the first position of each token's block of 4, for the entry that it may close."""
    block4_sin: torch.Tensor
    block128_cos: torch.Tensor
    block128_sin: torch.Tensor
    visible4: torch.Tensor
    """int64 [T], how many entries each token sees in ratio-4 layers."""
    window_units: torch.Tensor
    """int64 [T], the slot whose window ring keeps the token's row, -1 for none: a chunk's last 128 are kept."""
    window_places: torch.Tensor
    """int64 [T], its row of the ring."""
    count0: torch.Tensor
    """int32 [T], how many entries each token attends to: none,"""
    count4: torch.Tensor
    """at most top-k, """
    count128: torch.Tensor
    """all that it sees."""
    dense: torch.Tensor
    """int32 [T, N]: the entries that each token sees in ratio-128 layers, -1 unused."""
    dense_rows: torch.Tensor
    """The same as rows of the pool; [T, 0] but in decode."""
    window_rows: torch.Tensor
    """int32 [T, 128]: rows of the window's pool that each token of a decode step sees, -1 unused."""


def step_tables(places: TokenPlaces, main: torch.Tensor, compressed: torch.Tensor, top_k: int, longest: int) -> StepTables:
    """main, compressed: fp32 [rope / 2], frequencies of layers without and with entries; longest: bound of the tokens of any sequence,
    this step's included: N = longest // 128."""
    positions = places.positions_T
    visible4, visible128 = (positions + 1) // 4, (positions + 1) // 128
    dense = all_visible(visible128, longest // 128)
    ring = torch.arange(WINDOW_ROWS, dtype=torch.int32, device=positions.device)
    first = (places.slots_T * WINDOW_ROWS).int()[:, None]
    return StepTables(
        *rotation(positions, main),
        *rotation(positions, compressed),
        *rotation(positions // 4 * 4, compressed),
        *rotation(positions // 128 * 128, compressed),
        visible4=visible4,
        window_units=torch.where(places.is_among_last(WINDOW_ROWS), places.slots_T, -1),
        window_places=positions % WINDOW_ROWS,
        count0=torch.zeros_like(visible4).int(),
        count4=visible4.clamp(max=top_k).int(),
        count128=visible128.int(),
        dense=dense,
        dense_rows=places.rows_of(dense, C128_ROWS_PER_PAGE) if places.is_decode else dense[:, :0],
        # Before the ring is full only rows 0..position are written.
        window_rows=torch.where(ring <= positions[:, None], first + ring, -1).int(),
    )


def all_visible(visible_T: torch.Tensor, count: int) -> torch.Tensor:
    """int32 [T, count]: entry numbers 0, 1, ... while visible, then -1."""
    every = torch.arange(count, dtype=torch.int32, device=visible_T.device)
    return torch.where(every < visible_T[:, None], every, -1).int()


OP = Op("step_tables", step_tables, backends={"triton": Impl("engine.ops.step_tables.triton", requires.triton)})

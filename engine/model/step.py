"""What all layers of one step share: made once, before the first of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from engine.batch import Batch, TokenPlaces
from engine.cache.layout import C128_ROWS_PER_PAGE, WINDOW_ROWS
from engine.config import ModelConfig
from engine.model.rope import Rotation, compress_frequencies, main_frequencies, rotation


@dataclass(frozen=True, slots=True)
class Step:
    places: TokenPlaces
    batch: Batch
    tokens: dict[int, Rotation]
    """By ratio of the layer: of each token's position."""
    blocks: dict[int, Rotation]
    """By ratio, 4 and 128: of the first position of each token's block, for the entry that it may close."""
    visible: dict[int, torch.Tensor]
    """By ratio, 4 and 128: int64 [T], how many entries each token sees."""
    window_units_T: torch.Tensor
    """int64, the slot whose window ring keeps the token's row, -1 for none: a chunk's last 128 are kept."""
    window_rows_T: torch.Tensor
    """int64, its row of the ring."""
    dense: torch.Tensor
    """int32 [T, N]: the entries that each token sees in ratio-128 layers, -1 unused."""
    dense_rows: torch.Tensor
    """The same as rows of the pool; decode only."""
    window_rows: torch.Tensor
    """int32 [T, 128]: rows of the window's pool that each token sees, -1 unused; decode only."""
    counts: dict[int, torch.Tensor]
    """By ratio: int32 [T], how many entries each token attends to."""
    memo: dict[int, dict[str, Any]] = field(default_factory=dict)
    """What attention's backend keeps from layer to layer, by ratio."""


class StepMaker:
    """Holds the frequencies."""

    def __init__(self, model: ModelConfig, device: torch.device) -> None:
        self._topk = model.index_topk
        self._main, self._compressed = main_frequencies(model).to(device), compress_frequencies(model).to(device)

    def __call__(self, batch: Batch) -> Step:
        places = batch.places
        positions = places.positions_T
        compressed = rotation(positions, self._compressed)
        visible = {ratio: (positions + 1) // ratio for ratio in (4, 128)}
        dense = all_visible(visible[128], batch.longest // 128)
        ring = torch.arange(WINDOW_ROWS, dtype=torch.int32, device=positions.device)
        first = (places.slots_T * WINDOW_ROWS).int()[:, None]
        counts = {0: torch.zeros_like(visible[4]), 4: visible[4].clamp(max=self._topk), 128: visible[128]}
        return Step(
            places=places,
            batch=batch,
            tokens={0: rotation(positions, self._main), 4: compressed, 128: compressed},
            blocks={ratio: rotation(positions // ratio * ratio, self._compressed) for ratio in (4, 128)},
            visible=visible,
            window_units_T=torch.where(places.is_among_last(WINDOW_ROWS), places.slots_T, -1),
            window_rows_T=positions % WINDOW_ROWS,
            dense=dense,
            dense_rows=places.rows_of(dense, C128_ROWS_PER_PAGE) if places.is_decode else dense[:, :0],
            # Before the ring is full only rows 0..position are written.
            window_rows=torch.where(ring <= positions[:, None], first + ring, -1).int(),
            counts={ratio: count.int() for ratio, count in counts.items()},
        )


def all_visible(visible_T: torch.Tensor, count: int) -> torch.Tensor:
    """int32 [T, count]: entry numbers 0, 1, ... while visible, then -1."""
    every = torch.arange(count, dtype=torch.int32, device=visible_T.device)
    return torch.where(every < visible_T[:, None], every, -1).int()

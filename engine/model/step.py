"""What all layers of one step share: made once, before the first of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.batch import Batch, TokenPlaces
from engine.cache.layout import WINDOW_ROWS
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
    """int32 [T, N]: the entries that each token sees in ratio-128 layers (and in ratio-4 ones while they are few), -1 unused."""


class StepMaker:
    """Holds the frequencies."""

    def __init__(self, model: ModelConfig, device: torch.device) -> None:
        self._main, self._compressed = main_frequencies(model).to(device), compress_frequencies(model).to(device)

    def __call__(self, batch: Batch) -> Step:
        places = batch.places
        positions = places.positions_T
        compressed = rotation(positions, self._compressed)
        visible = {ratio: (positions + 1) // ratio for ratio in (4, 128)}
        return Step(
            places=places,
            batch=batch,
            tokens={0: rotation(positions, self._main), 4: compressed, 128: compressed},
            blocks={ratio: rotation(positions // ratio * ratio, self._compressed) for ratio in (4, 128)},
            visible=visible,
            window_units_T=torch.where(places.is_among_last(WINDOW_ROWS), places.slots_T, -1),
            window_rows_T=positions % WINDOW_ROWS,
            dense=all_visible(visible[128], batch.longest // 128),
        )


def all_visible(visible_T: torch.Tensor, count: int) -> torch.Tensor:
    """int32 [T, count]: entry numbers 0, 1, ... while visible, then -1."""
    every = torch.arange(count, dtype=torch.int32, device=visible_T.device)
    return torch.where(every < visible_T[:, None], every, -1).int()

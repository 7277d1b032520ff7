"""What all layers of one step share: made once, before the first of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from engine.batch import Batch, TokenPlaces
from engine.config import ModelConfig
from engine.model.prompts import PromptRows, prompt_rows
from engine.model.rope import Rotation, compress_frequencies, main_frequencies
from engine.ops.registry import BoundOps
from engine.ops.step_tables import StepTables


@dataclass(frozen=True, slots=True)
class Step:
    places: TokenPlaces
    batch: Batch
    tables: StepTables
    tokens: dict[int, Rotation]
    """By ratio of the layer: of each token's position."""
    blocks: dict[int, Rotation]
    """By ratio, 4 and 128: of the first position of each token's block, for the entry that it may close."""
    counts: dict[int, torch.Tensor]
    """By ratio: int32 [T], how many entries each token attends to."""
    prompts: tuple[PromptRows, ...]
    """None of them in decode."""
    memo: dict[int, dict[str, Any]] = field(default_factory=dict)
    """What attention's backend keeps from layer to layer, by ratio."""


class StepMaker:
    """Holds the frequencies."""

    def __init__(self, model: ModelConfig, ops: BoundOps, device: torch.device) -> None:
        self._topk, self._ops = model.index_topk, ops
        self._main, self._compressed = main_frequencies(model).to(device), compress_frequencies(model).to(device)

    def __call__(self, batch: Batch) -> Step:
        tables: StepTables = self._ops.step_tables(batch.places, self._main, self._compressed, self._topk, batch.longest)
        compressed = tables.token_cos, tables.token_sin
        return Step(
            places=batch.places,
            batch=batch,
            tables=tables,
            tokens={0: (tables.main_cos, tables.main_sin), 4: compressed, 128: compressed},
            blocks={4: (tables.block4_cos, tables.block4_sin), 128: (tables.block128_cos, tables.block128_sin)},
            counts={0: tables.count0, 4: tables.count4, 128: tables.count128},
            prompts=() if batch.places.is_decode else prompt_rows(batch, tables.dense, self._ops),
        )

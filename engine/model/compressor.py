"""Gated pooling of the KV stream: a block of 4 or 128 tokens becomes one entry (deepseek_v4.md, 2.3).

Only complete blocks emit. What is pending lives in the sequence's slot: for ratio 4 a ring of 8 rows, for ratio 128 the online state.
"""

from __future__ import annotations

import torch

from engine.cache.arena import RowPool
from engine.model.linear import Build
from engine.model.step import Step


class Compressor:
    """Of one layer, or of the layer's indexer (`is_index`), whose entries are the index keys."""

    def __init__(self, build: Build, prefix: str, ratio: int, is_index: bool = False) -> None:
        self._ops, self._dtype, self._eps = build.ops, build.dtype, build.model.rms_norm_eps
        self._ratio, self._is_index = ratio, is_index
        self._ape = build.tensor(f"{prefix}.ape").float()
        self._norm = build.tensor(f"{prefix}.norm.weight")

    @staticmethod
    def projections(prefix: str) -> tuple[str, str]:
        """Weights whose fp32 products with the layer's input, side by side, `store` takes."""
        return f"{prefix}.wkv.weight", f"{prefix}.wgate.weight"

    def store(self, projected: torch.Tensor, step: Step, pending: torch.Tensor, pool: RowPool) -> None:
        """projected: fp32 [T, N]. Store the entries that the step's tokens close; `pending` is the cache's ring or state."""
        cos, sin = step.blocks[self._ratio]
        head = (projected, self._ape, pending, step.places, self._norm, cos, sin, self._eps, self._dtype)
        if self._ratio == 4:
            self._ops.compress_c4(*head, self._is_index, pool)
        else:
            self._ops.compress_c128(*head, pool)

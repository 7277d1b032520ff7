"""The lightning indexer: which compressed entries each query of a ratio-4 layer attends to (deepseek_v4.md, 2.4)."""

from __future__ import annotations

from collections.abc import Callable

import torch

from engine.cache.arena import LayerCache
from engine.model.compressor import Compressor
from engine.model.linear import Build, Linear
from engine.model.quantized import QuantizedRows
from engine.model.step import Step
from engine.ops.step_tables import all_visible

SCORES_AT_ONCE = 1 << 26
"""Scores held at a time, 256 MiB: queries are taken in slices, so that a long context needs no more."""


class Indexer:
    """Owns the second, smaller compressor; its keys lie beside the entries in the pages."""

    def __init__(self, build: Build, prefix: str) -> None:
        model = build.model
        self._ops, self._heads, self._topk = build.ops, model.index_n_heads, model.index_topk
        self._scale = model.index_head_dim**-0.5 * model.index_n_heads**-0.5
        self._wq_b = Linear(build, f"{prefix}.wq_b.weight")
        self._compressor = Compressor(build, f"{prefix}.compressor", 4, is_index=True)

    @property
    def takes_quantized(self) -> bool:
        """Whether `select` takes quantised queries."""
        return self._wq_b.takes_quantized

    @staticmethod
    def projections(prefix: str) -> tuple[tuple[str, ...], ...]:
        """Weights whose fp32 products with the layer's input `store` takes, and those that are the weights of the heads."""
        return Compressor.projections(f"{prefix}.compressor"), (f"{prefix}.weights_proj.weight",)

    def store(self, projected: torch.Tensor, step: Step, cache: LayerCache) -> None:
        """projected: of the compressor. Stores the keys that the step closes."""
        assert cache.index_ring is not None and cache.index_keys is not None
        self._compressor.store(projected, step, cache.index_ring, cache.index_keys)

    def select(
        self, qr: torch.Tensor | QuantizedRows, stored: Callable[[], tuple[torch.Tensor, ...]], step: Step, cache: LayerCache
    ) -> torch.Tensor:
        """qr: [T, q_lora_rank]; `stored` joins `store`, and gives what all projections made, the weights of the heads last. Returns int32
        [T, K] entries to attend to, -1 unused."""
        assert cache.index_keys is not None
        num_entries = step.batch.longest // 4
        if num_entries <= self._topk:
            return all_visible(step.tables.visible4, num_entries)
        q, weights = self._wq_b(qr).unflatten(1, (self._heads, -1)), stored()[-1]
        q, weights = self._ops.index_query(q, weights, *step.tokens[4], self._scale, cache.index_keys.form)
        chosen, most = [], max(1, SCORES_AT_ONCE // num_entries)
        for start in range(0, len(q), most):
            rows = slice(start, start + most)
            scores = self._ops.index_logits(q[rows], weights[rows], cache.index_keys, step.places.of_rows(rows), num_entries)
            chosen.append(self._ops.index_topk(scores, step.tables.visible4[rows], self._topk))
        return chosen[0] if len(chosen) == 1 else torch.cat(chosen)

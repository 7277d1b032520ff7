"""The lightning indexer: which compressed entries each query of a ratio-4 layer attends to (deepseek_v4.md, 2.4)."""

from __future__ import annotations

from collections.abc import Callable

import torch

from engine.cache.arena import LayerCache
from engine.model.compressor import Compressor
from engine.model.linear import Build, Linear
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
        self._weights_proj = Linear(build, f"{prefix}.weights_proj.weight")
        self._compressor = Compressor(build, f"{prefix}.compressor", 4, is_index=True)

    def store(self, x: torch.Tensor, projected: torch.Tensor, step: Step, cache: LayerCache) -> torch.Tensor:
        """x: [T, d]; projected: of the compressor. Stores the keys that the step closes. Returns the weights of the heads, [T, Hi]."""
        assert cache.index_ring is not None and cache.index_keys is not None
        self._compressor.store(projected, step, cache.index_ring, cache.index_keys)
        weights: torch.Tensor = self._weights_proj(x)
        return weights

    def select(self, qr: torch.Tensor, stored: Callable[[], torch.Tensor | None], step: Step, cache: LayerCache) -> torch.Tensor:
        """qr: [T, q_lora_rank]; `stored` joins `store`. Returns int32 [T, K] entries to attend to, -1 unused."""
        assert cache.index_keys is not None
        num_entries = step.batch.longest // 4
        if num_entries <= self._topk:
            return all_visible(step.tables.visible4, num_entries)
        q, weights = self._wq_b(qr).unflatten(1, (self._heads, -1)), stored()
        q, weights = self._ops.index_query(q, weights, *step.tokens[4], self._scale, cache.index_keys.form)
        chosen, most = [], max(1, SCORES_AT_ONCE // num_entries)
        for start in range(0, len(q), most):
            rows = slice(start, start + most)
            scores = self._ops.index_logits(q[rows], weights[rows], cache.index_keys, step.places.of_rows(rows), num_entries)
            chosen.append(self._ops.index_topk(scores, step.tables.visible4[rows], self._topk))
        return chosen[0] if len(chosen) == 1 else torch.cat(chosen)

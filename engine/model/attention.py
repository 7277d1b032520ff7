"""Attention over the sliding window and compressed entries (deepseek_v4.md, 2.2 to 2.4).

x -> queries, one shared key-value vector a token -> write the window row, the entries and index keys that this token closes ->
attend (window of 128, chosen entries, sink) -> undo the rotation -> grouped output projection.

A batch of single tokens attends in place, over the rings and pages; anything else over gathered rows (prompts.py).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from engine.cache.arena import LayerCache
from engine.cache.layout import C4_ROWS_PER_PAGE
from engine.model.compressor import Compressor
from engine.model.indexer import Indexer
from engine.model.linear import Build, Linear, Linears
from engine.model.prompts import PromptRows
from engine.model.quantized import QuantizedRows, some_rows
from engine.model.step import Step


class Attention:
    def __init__(self, build: Build, prefix: str, ratio: int) -> None:
        model, share = build.model, build.heads
        self._ops, self._sides, self._ratio, self._eps = build.ops, build.sides, ratio, model.rms_norm_eps
        self._share, ranks = share, 1 if share is None else share.size
        self._heads, self._dim, self._groups = model.num_attention_heads // ranks, model.head_dim, model.o_groups // ranks
        self._scale = model.head_dim**-0.5
        self._wq_a_wkv = Linears(build, ((f"{prefix}.wq_a.weight",), (f"{prefix}.wkv.weight",)))
        self._q_norm = build.tensor(f"{prefix}.q_norm.weight")
        wq_b, wo_a = (build.weights[f"{prefix}.{name}.weight"] for name in ("wq_b", "wo_a"))
        sink = build.tensor(f"{prefix}.attn_sink")
        if share is not None:
            wq_b, wo_a = (some_rows(whole, share.part(whole.shape[0])) for whole in (wq_b, wo_a))
            sink = sink[share.part(len(sink))]
        self._wq_b = Linear.of(build, wq_b)
        self._kv_norm = build.tensor(f"{prefix}.kv_norm.weight")
        self._sink = sink.float()
        self._wo_b = Linear(build, f"{prefix}.wo_b.weight")
        # Its input is not quantised, whatever the weight's format (spec 2.2).
        self._wo_a = build.ops.pack["grouped_linear"](wo_a, self._groups)
        self._compressor = Compressor(build, f"{prefix}.compressor", ratio) if ratio else None
        self._indexer = Indexer(build, f"{prefix}.indexer") if ratio == 4 else None
        self._quantize_qr = self._wq_b.takes_quantized and (self._indexer is None or self._indexer.takes_quantized)
        of_indexer = Indexer.projections(f"{prefix}.indexer") if ratio == 4 else ()
        projections = (Compressor.projections(f"{prefix}.compressor"), *of_indexer)
        self._compress = Linears(build, projections, torch.float32) if ratio else None

    @property
    def widening_bytes(self) -> int:
        """How many more wo_a takes once `widen`ed; 0 if it cannot be, or is."""
        return int(self._wo_a.widening_bytes) if "grouped_linear" in self._ops.widen else 0

    def widen(self) -> None:
        """Hold wo_a in the backend's larger form as well, which is quicker for more than FEW_TOKENS tokens."""
        self._wo_a = self._ops.widen["grouped_linear"](self._wo_a)

    @property
    def takes_quantized(self) -> bool:
        """Whether `forward` has a use for quantised rows."""
        return self._wq_a_wkv.takes_quantized

    def forward(self, x: torch.Tensor, quantized: QuantizedRows | None, step: Step, cache: LayerCache) -> torch.Tensor:
        """x: [T, d] after attn_norm, and in FP8 -> [T, d]. Reads and writes the cache of the batch's sequences."""
        cos, sin = step.tokens[self._ratio]
        before = [self._ops.pool_rows(cache.window, *prompts.before) for prompts in step.prompts]
        compressed = self._sides[0].start(lambda: self._store_keys(x, step, cache))
        qr, kv = self._wq_a_wkv(x if quantized is None else quantized)
        stored = self._sides[0].start(lambda: self._store_rows(kv, compressed(), step, cache))
        qr = self._ops.rms_norm(qr, self._q_norm, self._eps, self._quantize_qr)
        selected = self._sides[1].start(lambda: self._select(qr, compressed, step, cache))
        q = self._ops.q_norm_rope(self._wq_b(qr).unflatten(1, (self._heads, self._dim)), cos, sin, self._eps)
        kv, chosen = stored(), selected()
        if step.places.is_decode:
            o = self._decode(q, chosen, step, cache)
        else:
            parts = [
                self._prefill(q[prompts.tokens], (kv[prompts.tokens], rows), chosen[prompts.tokens], prompts, cache)
                for prompts, rows in zip(step.prompts, before, strict=True)
            ]
            o = self._ops.output_derotate(parts[0] if len(parts) == 1 else torch.cat(parts), cos, sin)
        z = self._ops.grouped_linear(o.flatten(1).unflatten(1, (self._groups, -1)), self._wo_a).flatten(1)
        return self._wo_b(z if self._share is None else self._share.columns(z))

    def _store_keys(self, x: torch.Tensor, step: Step, cache: LayerCache) -> tuple[torch.Tensor, ...]:
        """Index keys that are closed go into the cache, the first thing that anything waits for. Returns x's projections for entries,
        index keys and weights of the indexer's heads, as far as the layer has them."""
        projected = () if self._compress is None else self._compress(x)
        if self._indexer is not None:
            self._indexer.store(projected[1], step, cache)
        return projected

    def _store_rows(self, kv: torch.Tensor, projected: tuple[torch.Tensor, ...], step: Step, cache: LayerCache) -> torch.Tensor:
        """Rows of the window, and entries that are closed, go into the cache. Returns the former as stored, [T, D]."""
        where = cache.window, step.tables.window_units, step.tables.window_places
        rows: torch.Tensor = self._ops.kv_store(kv, self._kv_norm, *step.tokens[self._ratio], self._eps, *where)
        if self._compressor is not None:
            pending = cache.ring if self._ratio == 4 else cache.state
            assert pending is not None and cache.entries is not None
            self._compressor.store(projected[0], step, pending, cache.entries)
        return rows

    def _select(
        self, qr: torch.Tensor | QuantizedRows, compressed: Callable[[], tuple[torch.Tensor, ...]], step: Step, cache: LayerCache
    ) -> torch.Tensor:
        """int32 [T, K]: the entries that each token attends to, -1 unused."""
        if self._indexer is not None:
            return self._indexer.select(qr, compressed, step, cache)
        return step.tables.dense if self._ratio else step.tables.dense[:, :0]

    def _decode(self, q: torch.Tensor, chosen: torch.Tensor, step: Step, cache: LayerCache) -> torch.Tensor:
        """[S, H, D] -> o [S, H, D], turned back, over rings and pages where they lie. chosen: int32 [S, K]."""
        rows = chosen
        if self._ratio:
            rows = self._ops.page_rows(chosen, step.places, C4_ROWS_PER_PAGE) if self._ratio == 4 else step.tables.dense_rows
        memo, turned = step.memo.setdefault(self._ratio, {}), step.tokens[self._ratio]
        o: torch.Tensor = self._ops.sparse_attn_decode(
            q, cache.window, step.tables.window_rows, cache.entries, rows, step.counts[self._ratio], self._sink, self._scale, *turned, memo
        )
        return o

    def _prefill(
        self, q: torch.Tensor, window: tuple[torch.Tensor, ...], chosen: torch.Tensor, prompts: PromptRows, cache: LayerCache
    ) -> torch.Tensor:
        """A run of sequences: [T, H, D] -> o [T, H, D]. window: rows [T, D] of their tokens and [N, D] of those before, as the cache holds
        them; chosen: int32 [T, K]."""
        rows = window if cache.entries is None else (*window, self._ops.pool_rows(cache.entries, *prompts.entries[self._ratio]))
        indices = prompts.indices.get(self._ratio)
        if indices is None:
            indices = self._ops.prompt_indices(prompts.window, chosen, prompts.base)
        o: torch.Tensor = self._ops.sparse_attn_prefill(q, torch.cat(rows), indices, self._sink, self._scale)
        return o

"""Attention over the sliding window and compressed entries (deepseek-v4 spec, sections 2.2 to 2.4).

x -> queries, one shared key-value vector a token -> write the window row, the entries and index keys that this token closes ->
attend (window of 128, chosen entries, sink) -> undo the rotation -> grouped output projection.

A batch of single tokens takes the decode path, vectorised over sequences; anything else goes sequence by sequence.
"""

from __future__ import annotations

import torch

from engine.batch import Batch
from engine.cache.arena import LayerCache
from engine.cache.layout import WINDOW_ROWS
from engine.model.compressor import CompressorC4, CompressorC128
from engine.model.indexer import Indexer
from engine.model.linear import Build, Linear
from engine.model.rope import compress_frequencies, main_frequencies, rotation


class Attention:
    def __init__(self, build: Build, prefix: str, ratio: int, index_quantized: bool) -> None:
        model = build.model
        self._ops, self._dtype, self._ratio, self._eps = build.ops, build.dtype, ratio, model.rms_norm_eps
        self._heads, self._dim, self._groups, self._o_rank = (
            model.num_attention_heads,
            model.head_dim,
            model.o_groups,
            model.o_lora_rank,
        )
        self._scale = model.head_dim**-0.5
        self._frequencies = compress_frequencies(model) if ratio else main_frequencies(model)
        self._wq_a = Linear(build, f"{prefix}.wq_a.weight")
        self._q_norm = build.tensor(f"{prefix}.q_norm.weight")
        self._wq_b = Linear(build, f"{prefix}.wq_b.weight")
        self._wkv = Linear(build, f"{prefix}.wkv.weight")
        self._kv_norm = build.tensor(f"{prefix}.kv_norm.weight")
        self._sink = build.tensor(f"{prefix}.attn_sink").float()
        self._wo_b = Linear(build, f"{prefix}.wo_b.weight")
        wo_a = build.weights[f"{prefix}.wo_a.weight"]  # dequantised: its input is not quantised (spec 2.2.4)
        plain = wo_a if isinstance(wo_a, torch.Tensor) else wo_a.dequantize()
        self._wo_a = [build.ops.pack["linear"](part) for part in plain.chunk(self._groups)]
        self._c4 = CompressorC4(build, f"{prefix}.compressor") if ratio == 4 else None
        self._c128 = CompressorC128(build, f"{prefix}.compressor") if ratio == 128 else None
        self._indexer = Indexer(build, f"{prefix}.indexer", index_quantized) if ratio == 4 else None

    def forward(self, x: torch.Tensor, batch: Batch, cache: LayerCache) -> torch.Tensor:
        """x: [T, d] after attn_norm -> [T, d]. Reads and writes the cache of the batch's sequences."""
        cos, sin = rotation(batch.positions_T, self._frequencies)
        qr = self._ops.rms_norm(self._wq_a(x), self._q_norm, self._eps)
        q = self._ops.q_norm_rope(self._wq_b(qr).unflatten(1, (self._heads, self._dim)), cos, sin, self._eps)
        kv = self._ops.kv_norm_rope(self._wkv(x), self._kv_norm, cos, sin, self._eps, self._dtype)
        index_q = self._indexer.queries(x, qr, cos, sin, cache) if self._indexer else None
        if batch.is_decode:
            o = self._decode(x, q, kv, index_q, batch, cache)
        else:
            parts, first = [], 0
            for number, length in enumerate(batch.lengths_S):
                rows = slice(first, first + length)
                picked = (index_q[0][rows], index_q[1][rows]) if index_q else None
                parts.append(self._prefill(x[rows], q[rows], kv[rows], picked, batch, number, cache))
                first += length
            o = torch.cat(parts)
        o = self._ops.output_derotate(o, cos, sin).flatten(1).unflatten(1, (self._groups, -1))
        z = torch.cat([self._ops.linear(o[:, g], self._wo_a[g], self._dtype) for g in range(self._groups)], dim=1)
        return self._wo_b(z)

    def _entry(self, closed: torch.Tensor, numbers: torch.Tensor, norm_weight: torch.Tensor) -> torch.Tensor:
        """Closed entries fp32 [n, D] -> rows to store; an entry is rotated to the first position of its block."""
        cos, sin = rotation(numbers * self._ratio, self._frequencies)
        entry: torch.Tensor = self._ops.kv_norm_rope(closed, norm_weight, cos, sin, self._eps, self._dtype)
        return entry

    def _store(
        self,
        cache: LayerCache,
        closed: torch.Tensor,
        index_closed: torch.Tensor | None,
        numbers: torch.Tensor,
        pages: torch.Tensor,
    ) -> None:
        """Write closed entries (and index keys) of the given numbers; pages: int64 [n] page id of each."""
        if not len(numbers):
            return
        compressor = self._c4 or self._c128
        assert compressor is not None and cache.entries is not None
        rows = numbers % cache.entries.data.shape[1]
        cache.entries.write(pages, rows, self._entry(closed, numbers, compressor.norm_weight))
        if self._indexer is not None:
            assert cache.index_keys is not None and index_closed is not None
            cos, sin = rotation(numbers * self._ratio, self._frequencies)
            cache.index_keys.write(pages, rows, self._indexer.keys(index_closed, cos, sin))

    def _prefill(
        self,
        x: torch.Tensor,
        q: torch.Tensor,
        kv: torch.Tensor,
        index_q: tuple[torch.Tensor, torch.Tensor] | None,
        batch: Batch,
        number: int,
        cache: LayerCache,
    ) -> torch.Tensor:
        """One sequence's chunk: [T, d], [T, H, D], [T, D] -> o [T, H, D]."""
        start, length, slot = batch.starts_S[number], len(x), int(batch.slot_ids_S[number])
        positions = torch.arange(start, start + length, device=x.device)
        pages = batch.page_table_SP[number]
        before = torch.arange(max(0, start - WINDOW_ROWS + 1), start, device=x.device)
        #   rows = [ window before the chunk | the chunk | entries ], all as the cache holds them
        rows = torch.cat((cache.window.read(torch.tensor(slot), before % WINDOW_ROWS), cache.window.form.round_trip(kv)))
        indices = torch.arange(WINDOW_ROWS, device=x.device) + (positions[:, None] - WINDOW_ROWS + 1) - (start - len(before))
        indices = indices.clamp(min=-1)
        if self._ratio:
            self._close(x, start, slot, pages, cache)
            assert cache.entries is not None
            numbers = torch.arange((start + length) // self._ratio, device=x.device)
            per_page = cache.entries.data.shape[1]
            visible = (positions + 1) // self._ratio
            if index_q is not None and self._indexer is not None and len(numbers) > self._indexer.topk:
                assert cache.index_keys is not None
                keys = cache.index_keys.read(pages[numbers // per_page], numbers % per_page)
                chosen = self._indexer.select(*index_q, keys, visible)
            else:
                chosen = torch.where(numbers < visible[:, None], numbers, -1)
            indices = torch.cat((indices, torch.where(chosen >= 0, chosen + len(rows), -1)), dim=1)
            rows = torch.cat((rows, cache.entries.read(pages[numbers // per_page], numbers % per_page)))
        o: torch.Tensor = self._ops.sparse_attn_prefill(q, rows, indices, self._sink, self._scale)
        last = slice(-min(WINDOW_ROWS, length), None)
        cache.window.write(torch.tensor(slot), positions[last] % WINDOW_ROWS, kv[last])
        return o

    def _close(self, x: torch.Tensor, start: int, slot: int, pages: torch.Tensor, cache: LayerCache) -> None:
        """Advance the compressors of one sequence by a chunk and store the entries that it closes."""
        index_closed = None
        if self._c4 is not None:
            assert cache.ring is not None and cache.index_ring is not None and self._indexer is not None
            closed = self._c4.extend(x, start, cache.ring, slot)
            index_closed = self._indexer.compressor.extend(x, start, cache.index_ring, slot)
        else:
            assert self._c128 is not None and cache.state is not None
            closed = self._c128.extend(x, start, cache.state, slot)
        first = start // self._ratio
        numbers = torch.arange(first, first + len(closed), device=x.device)
        assert cache.entries is not None
        self._store(cache, closed, index_closed, numbers, pages[numbers // cache.entries.data.shape[1]])

    def _decode(
        self,
        x: torch.Tensor,
        q: torch.Tensor,
        kv: torch.Tensor,
        index_q: tuple[torch.Tensor, torch.Tensor] | None,
        batch: Batch,
        cache: LayerCache,
    ) -> torch.Tensor:
        """One token of each sequence: [S, d], [S, H, D], [S, D] -> o [S, H, D]. Everything that the token closes is written before
        it attends, for it sees that too."""
        slots, positions, pages = batch.slot_ids_S, batch.positions_T, batch.page_table_SP
        cache.window.write(slots, positions % WINDOW_ROWS, kv)
        chosen = positions.new_empty(len(x), 0)
        if self._ratio:
            index_closed = None
            if self._c4 is not None:
                assert cache.ring is not None and cache.index_ring is not None and self._indexer is not None
                which, closed = self._c4.step(x, positions, cache.ring, slots)
                _, index_closed = self._indexer.compressor.step(x, positions, cache.index_ring, slots)
            else:
                assert self._c128 is not None and cache.state is not None
                which, closed = self._c128.step(x, positions, cache.state, slots)
            assert cache.entries is not None
            per_page = cache.entries.data.shape[1]
            numbers = positions[which] // self._ratio
            self._store(cache, closed, index_closed, numbers, pages[which, numbers // per_page])
            visible = (positions + 1) // self._ratio
            every = torch.arange(int(visible.max()), device=x.device)
            if index_q is not None and self._indexer is not None and len(every) > self._indexer.topk:
                assert cache.index_keys is not None
                keys = cache.index_keys.read(pages[:, every // per_page].clamp(min=0), every % per_page)
                chosen = self._indexer.select(*index_q, keys, visible)
            else:
                chosen = torch.where(every < visible[:, None], every, -1)
        o: torch.Tensor = self._ops.sparse_attn_decode(
            q, cache.window, slots, positions, cache.entries, pages, chosen, self._sink, self._scale
        )
        return o

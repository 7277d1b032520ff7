"""The lightning indexer: which compressed entries each query of a ratio-4 layer attends to (deepseek-v4 spec, section 2.4)."""

from __future__ import annotations

import torch

from engine.cache.arena import LayerCache
from engine.model.compressor import CompressorC4
from engine.model.linear import Build, Linear
from engine.model.rope import rotate


def hadamard(size: int) -> torch.Tensor:
    """Sylvester's matrix of order `size` (a power of two), normalised to be orthogonal; float64."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix * size**-0.5


class Indexer:
    """Owns the second, smaller compressor; its keys lie beside the entries in the pages."""

    def __init__(self, build: Build, prefix: str, quantized: bool) -> None:
        """`quantized`: keys and queries are rotated by the Hadamard matrix and quantised (formats fp8 and fp4)."""
        model = build.model
        self._ops, self._dtype = build.ops, build.dtype
        self._heads, self._dim, self.topk = model.index_n_heads, model.index_head_dim, model.index_topk
        self._eps = model.rms_norm_eps
        self._scale = self._dim**-0.5 * self._heads**-0.5
        self._wq_b = Linear(build, f"{prefix}.wq_b.weight")
        self._weights_proj = Linear(build, f"{prefix}.weights_proj.weight")
        self.compressor = CompressorC4(build, f"{prefix}.compressor")
        self._hadamard = hadamard(self._dim) if quantized else None

    def _spread(self, x: torch.Tensor) -> torch.Tensor:
        return x if self._hadamard is None else (x.double() @ self._hadamard).to(x.dtype)

    def keys(self, entries: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Closed entries fp32 [n, Di] with the rotation of their first tokens -> index keys to store, [n, Di]."""
        return self._spread(self._ops.kv_norm_rope(entries, self.compressor.norm_weight, cos, sin, self._eps, self._dtype))

    def queries(
        self, x: torch.Tensor, qr: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, cache: LayerCache
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x: [T, d]; qr: [T, q_lora_rank]. Returns (q fp32 [T, Hi, Di] as quantised, head weights fp32 [T, Hi])."""
        q = self._wq_b(qr).unflatten(1, (self._heads, self._dim))
        q = self._spread(rotate(q.double(), cos, sin).to(q.dtype))
        if self._hadamard is not None:
            assert cache.index_keys is not None
            q = cache.index_keys.form.round_trip(q.flatten(0, 1)).view(q.shape)
        return q.float(), self._weights_proj(x).float() * self._scale

    def select(self, q: torch.Tensor, weights: torch.Tensor, keys: torch.Tensor, num_visible: torch.Tensor) -> torch.Tensor:
        """int64 [T, topk] entry numbers, -1 unused. keys: fp32 [S, Di] or [T, S, Di]; num_visible: int64 [T]."""
        chosen: torch.Tensor = self._ops.index_topk(self._ops.index_logits(q, weights, keys), num_visible, self.topk)
        return chosen

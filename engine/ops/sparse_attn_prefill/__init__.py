"""Attention of many queries of one sequence over selected rows, with a sink (spec 2.2)."""

from __future__ import annotations

import torch

from engine.ops import requires
from engine.ops.registry import Impl, Op

QUERY_BLOCK = 64


def sparse_attn_prefill(q: torch.Tensor, kv: torch.Tensor, indices: torch.Tensor, sink: torch.Tensor, scale: float) -> torch.Tensor:
    """q: [T, H, D]; kv: [S, D], keys and values at once, shared by all heads; indices: int32 [T, K] rows of kv that each query
    sees, -1 unused, no duplicates; sink: fp32 [H], a logit with value 0, not scaled. Returns [T, H, D] in q's dtype.
    """
    out = torch.empty_like(q)
    heads = q.shape[1]
    for start in range(0, len(q), QUERY_BLOCK):
        block = slice(start, start + QUERY_BLOCK)
        chosen = indices[block]
        columns = torch.unique(chosen)
        columns = columns[columns >= 0]
        rows = kv[columns].double()
        # visible[t, c]: query t sees column c. Unused places point at an extra column that is cut off.
        place = torch.where(chosen >= 0, torch.searchsorted(columns, chosen.clamp(min=0)), len(columns))
        visible = torch.zeros(len(chosen), len(columns) + 1, dtype=torch.bool, device=q.device)
        visible.scatter_(1, place, True)
        scores = (q[block].double().flatten(0, 1) @ rows.T).view(len(chosen), heads, len(columns)) * scale
        scores = scores.masked_fill(~visible[:, None, :-1], -torch.inf)
        top = torch.maximum(scores.amax(-1, keepdim=True), sink.double()[None, :, None])
        weight = torch.exp(scores - top)
        total = weight.sum(-1, keepdim=True) + torch.exp(sink.double()[None, :, None] - top)
        out[block] = ((weight / total).flatten(0, 1) @ rows).view(len(chosen), heads, -1).to(q.dtype)
    return out


OP = Op(
    "sparse_attn_prefill",
    sparse_attn_prefill,
    backends={
        "flash_mla": Impl("engine.ops.sparse_attn_prefill.flash_mla", requires.flash_mla, requires.fp8_rows),
        "triton": Impl("engine.ops.sparse_attn_prefill.triton", requires.triton),
    },
)

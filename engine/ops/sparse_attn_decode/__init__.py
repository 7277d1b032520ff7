"""Attention of one query a sequence over its window ring and selected entries in pages, with a sink (spec 2.2)."""

from __future__ import annotations

from typing import Any

import torch

from engine.cache.arena import RowPool
from engine.ops import requires
from engine.ops.output_derotate import output_derotate
from engine.ops.registry import Impl, Op


def sparse_attn_decode(
    q: torch.Tensor,
    window: RowPool,
    window_rows: torch.Tensor,
    entries: RowPool | None,
    entry_rows: torch.Tensor,
    num_entries: torch.Tensor,
    sink: torch.Tensor,
    scale: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
    memo: dict[str, Any],
) -> torch.Tensor:
    """q: [S, H, D], one token of each of S sequences. Each sees rows window_rows[s] of the window and entry_rows[s] of the entries: int32
    [S, 128] and [S, K] (K may be 0), numbers unit * R + r in a pool of R rows a unit; used ones first, then -1. num_entries: int32 [S],
    how many of entry_rows are used. sink: fp32 [H], a logit with value 0, not scaled. cos, sin: fp32 [S, rope / 2], by which q was turned
    and the result is turned back, as by `output_derotate`. memo: what a backend keeps from layer to layer of one step; empty at its
    start. Returns [S, H, D] in q's dtype; without rows the result is zero.
    """
    rows, used = _read(window, window_rows), window_rows >= 0
    if entries is not None and entry_rows.shape[1]:
        rows = torch.cat((rows, _read(entries, entry_rows)), dim=1)
        used = torch.cat((used, entry_rows >= 0), dim=1)
    rows64 = rows.double().masked_fill(~used[..., None], 0.0)  # an unused row may hold NaN bytes
    scores = (q.double() @ rows64.transpose(1, 2)) * scale
    scores = scores.masked_fill(~used[:, None], -torch.inf)
    bottom = sink.double()[None, :, None]
    top = torch.maximum(scores.amax(-1, keepdim=True), bottom)
    weight = torch.exp(scores - top)
    total = weight.sum(-1, keepdim=True) + torch.exp(bottom - top)
    return output_derotate(((weight / total) @ rows64).to(q.dtype), cos, sin)


def _read(pool: RowPool, rows: torch.Tensor) -> torch.Tensor:
    place = rows.clamp(min=0).long()
    return pool.read(place // pool.data.shape[1], place % pool.data.shape[1])


OP = Op(
    "sparse_attn_decode",
    sparse_attn_decode,
    backends={
        "flash_mla": Impl("engine.ops.sparse_attn_decode.flash_mla", requires.flash_mla, requires.fp8_rows),
        "triton": Impl("engine.ops.sparse_attn_decode.triton", requires.triton),
    },
)

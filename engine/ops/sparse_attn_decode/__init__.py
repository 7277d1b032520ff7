"""Attention of one query a sequence over its window ring and selected entries in pages, with a sink (spec 2.2.2)."""

from __future__ import annotations

import torch

from engine.cache.arena import RowPool
from engine.ops.registry import Op


def sparse_attn_decode(
    q: torch.Tensor,
    window: RowPool,
    slots: torch.Tensor,
    positions: torch.Tensor,
    entries: RowPool | None,
    pages: torch.Tensor,
    chosen: torch.Tensor,
    sink: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """q: [S, H, D], one token of each of S sequences. Window: rows of ring `slots[s]` at positions max(0, p - 127)..p mod 128.
    Entries: numbers chosen[s, k] (int64 [S, K], -1 unused, K may be 0) of the sequence, found through its page table
    pages (int64 [S, P]). sink: fp32 [H]. Returns [S, H, D] in q's dtype.
    """
    ring = window.data.shape[1]
    row = torch.arange(ring, device=q.device)
    rows = window.read(slots[:, None], row[None, :])
    visible = row[None, :] <= positions[:, None]  # before the ring is full only rows 0..p were written
    if entries is not None and chosen.shape[1]:
        per_page = entries.data.shape[1]
        number = chosen.clamp(min=0)
        found = entries.read(pages.gather(1, number // per_page).clamp(min=0), number % per_page)
        rows = torch.cat((rows, found), dim=1)
        visible = torch.cat((visible, chosen >= 0), dim=1)
    rows64 = rows.double().masked_fill(~visible[..., None], 0.0)  # an unused row may hold NaN bytes
    scores = (q.double() @ rows64.transpose(1, 2)) * scale
    scores = scores.masked_fill(~visible[:, None], -torch.inf)
    bottom = sink.double()[None, :, None]
    top = torch.maximum(scores.amax(-1, keepdim=True), bottom)
    weight = torch.exp(scores - top)
    total = weight.sum(-1, keepdim=True) + torch.exp(bottom - top)
    return ((weight / total) @ rows64).to(q.dtype)


OP = Op("sparse_attn_decode", sparse_attn_decode)

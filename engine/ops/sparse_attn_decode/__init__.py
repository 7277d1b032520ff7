"""Attention of one query a sequence over its window ring and selected entries in pages, with a sink (spec 2.2.2)."""

from __future__ import annotations

import torch

from engine.batch import TokenPlaces
from engine.cache.arena import RowPool
from engine.ops.registry import Op


def sparse_attn_decode(
    q: torch.Tensor,
    window: RowPool,
    entries: RowPool | None,
    chosen: torch.Tensor,
    places: TokenPlaces,
    sink: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """q: [S, H, D], one token of each of S sequences, whose own row is in the window already. Window: the last 128 positions, this one
    included, at row p mod 128 of the ring of its slot. Entries: numbers chosen[s, k] (int32 [S, K], -1 unused, K may be 0) of the
    sequence, found through its page table. sink: fp32 [H]. Returns [S, H, D] in q's dtype; a filler row's is zero.
    """
    ring = window.data.shape[1]
    row = torch.arange(ring, device=q.device)
    rows = window.read(places.slots_T[:, None], row[None, :])
    visible = row[None, :] <= places.positions_T[:, None]  # before the ring is full only rows 0..p were written
    if entries is not None and chosen.shape[1]:
        per_page = entries.data.shape[1]
        number = chosen.clamp(min=0).long()
        pages = places.page_table_SP[places.sequences_T].long().gather(1, number // per_page).clamp(min=0)
        rows = torch.cat((rows, entries.read(pages, number % per_page)), dim=1)
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

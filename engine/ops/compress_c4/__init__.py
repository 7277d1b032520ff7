"""Ratio-4 compression: each block of 4 tokens becomes one entry, pooled over 8 rows: the block before and this one (spec 2.3)."""

from __future__ import annotations

import torch

from engine.batch import TokenPlaces
from engine.cache.arena import RowPool
from engine.ops import requires
from engine.ops.index_query import spread
from engine.ops.kv_store import norm_rope
from engine.ops.registry import Impl, Op

RATIO = 4
RING = 8


def pool_c4(kv: torch.Tensor, score: torch.Tensor) -> torch.Tensor:
    """kv, score: fp32 [N, 8, 2, D]: 4 rows of the block before, 4 of this one; dim 2 is series A ("for the next block") and B ("for
    this block"). Returns fp32 [N, D]: softmax per channel over the 4 A rows of the first and the 4 B rows of the second; weighted sum.

    A neutral row (score -FLT_MAX, kv 0) weighs nothing: so it is before the first block of a sequence.
    """
    rows = torch.cat((kv[:, :4, 0], kv[:, 4:, 1]), dim=1).double()
    scores = torch.cat((score[:, :4, 0], score[:, 4:, 1]), dim=1).double()
    return (torch.softmax(scores, dim=1) * rows).sum(1).float()


def compress_c4(
    projected: torch.Tensor,
    ape: torch.Tensor,
    ring: torch.Tensor,
    places: TokenPlaces,
    norm_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
    dtype: torch.dtype,
    is_index: bool,
    pool: RowPool,
) -> None:
    """Store the entries that the step's tokens close, and keep in the slots what later ones need.

    projected: fp32 [T, 4 D], kv A, kv B, score A, score B of each token; ape: fp32 [4, 2 D], added to the scores by place in the block.
    ring: fp32 [slots, 8, 4, D], the same rows with ape, of position mod 8. A token at position 4 w + 3 closes entry w: pooled, rounded to
    `dtype`, normed, rotated with cos, sin (fp32 [T, rope / 2], of position 4 w, in the closing token's row), for an index key spread
    by the Hadamard matrix where the pool's format is quantised, and stored in the pool's page at row w mod rows.
    """
    rows = projected.unflatten(1, (4, -1)).clone()
    rows[:, 2:] += ape.unflatten(1, (2, -1))[places.positions_T.clamp(min=0) % RATIO]
    closing = torch.nonzero((places.positions_T >= 0) & (places.positions_T % RATIO == RATIO - 1))[:, 0]
    at = places.positions_T[closing, None] + torch.arange(1 - RING, 1, device=rows.device)
    in_batch = at >= places.starts_T[closing, None]
    here = (closing[:, None] + torch.arange(1 - RING, 1, device=rows.device)).clamp(min=0)
    blocks = torch.where(in_batch[:, :, None, None], rows[here], ring[places.slots_T[closing, None], at % RING])
    kept = torch.nonzero(places.is_among_last(RING))[:, 0]
    ring[places.slots_T[kept], places.positions_T[kept] % RING] = rows[kept]
    entries = pool_c4(blocks[:, :, :2], blocks[:, :, 2:]).to(dtype)
    store_entries(entries, closing, RATIO, places, norm_weight, cos, sin, eps, is_index, pool)


def store_entries(
    entries: torch.Tensor,
    closing: torch.Tensor,
    ratio: int,
    places: TokenPlaces,
    norm_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
    is_index: bool,
    pool: RowPool,
) -> None:
    """entries: [N, D] pooled and rounded, closed by the rows `closing` (int64 [N])."""
    if not len(closing):
        return
    numbers, per_page = places.positions_T[closing] // ratio, pool.data.shape[1]
    values = norm_rope(entries, norm_weight, cos[closing], sin[closing], eps, entries.dtype)
    pool.write(places.pages_of(closing, numbers, per_page), numbers % per_page, spread(values, pool.form) if is_index else values)


OP = Op("compress_c4", compress_c4, backends={"triton": Impl("engine.ops.compress_c4.triton", requires.triton)})

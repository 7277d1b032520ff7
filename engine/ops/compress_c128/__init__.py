"""Ratio-128 compression, online: running maximum, sum and weighted sum per channel (engine/model/deepseek_v4.md, 2.3 and 3)."""

from __future__ import annotations

import torch

from engine.batch import TokenPlaces
from engine.cache.arena import RowPool
from engine.ops import requires
from engine.ops.compress_c4 import store_entries
from engine.ops.registry import Impl, Op

RATIO = 128


def advance(kv: torch.Tensor, score: torch.Tensor, state: torch.Tensor, first: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """Advance N open blocks by some tokens each, strictly token by token, so that the result does not depend on how a prompt was cut.

    kv, score: fp32 [N, n, D], left-aligned tokens of each block. state: fp32 [N, 3, D] (maximum, sum, weighted sum) before them; first:
    int64 [N], the place (0..127) in its block of each one's first token: 0 starts from the neutral state. count: int64 [N] tokens given,
    1..n, first + count <= 128. Returns the state after them, fp32 [N, 3, D]; a full block's entry is weighted sum / sum.
    """
    neutral = torch.finfo(torch.float32).min
    fresh = (first == 0)[:, None]
    top = torch.where(fresh, neutral, state[:, 0]).double()
    total = torch.where(fresh, 0.0, state[:, 1]).double()
    weighted = torch.where(fresh, 0.0, state[:, 2]).double()
    for step in range(int(count.max()) if len(count) else 0):
        active = (step < count)[:, None]
        value, new = kv[:, step].double(), score[:, step].double()
        higher = torch.maximum(top, new)
        keep, add = torch.exp(top - higher), torch.exp(new - higher)
        # Rounded to float32 after every token, as the state is stored: a block cut anywhere goes through the same values.
        total = torch.where(active, (total * keep + add).float().double(), total)
        weighted = torch.where(active, (weighted * keep + add * value).float().double(), weighted)
        top = torch.where(active, higher, top)
    return torch.stack((top, total, weighted), dim=1).float()


def compress_c128(
    projected: torch.Tensor,
    ape: torch.Tensor,
    state: torch.Tensor,
    places: TokenPlaces,
    norm_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
    dtype: torch.dtype,
    pool: RowPool,
) -> None:
    """Store the entries that the step's tokens close, and keep the open blocks' state in the slots.

    projected: fp32 [T, 2 D], kv and score of each token; ape: fp32 [128, D], added to the scores by place in the block. state: fp32
    [slots, 3, D] of `advance`. A token at position 128 w + 127 closes entry w: rounded to `dtype`, normed, rotated with cos, sin (fp32
    [T, rope / 2], of position 128 w, in the closing token's row), and stored in the pool's page at row w mod rows.
    """
    positions, rows = places.positions_T, torch.arange(len(projected), device=projected.device)
    kv, score = projected.chunk(2, dim=1)
    score = score + ape[positions.clamp(min=0) % RATIO]
    begins = torch.nonzero((positions >= 0) & ((positions == places.starts_T) | (positions % RATIO == 0)))[:, 0]
    ends = torch.nonzero((positions >= 0) & (places.is_among_last(1) | (positions % RATIO == RATIO - 1)))[:, 0]
    count = ends - begins + 1
    if not len(count):
        return
    grid = (begins[:, None] + rows[: int(count.max())]).clamp(max=len(rows) - 1)
    after = advance(kv[grid], score[grid], state[places.slots_T[begins]], positions[begins] % RATIO, count)
    last = places.is_among_last(1)[ends]
    state[places.slots_T[ends[last]]] = after[last]
    full = positions[ends] % RATIO == RATIO - 1
    entries = (after[full, 2].double() / after[full, 1].double()).float().to(dtype)
    store_entries(entries, ends[full], RATIO, places, norm_weight, cos, sin, eps, False, pool)


OP = Op("compress_c128", compress_c128, backends={"triton": Impl("engine.ops.compress_c128.triton", requires.triton)})

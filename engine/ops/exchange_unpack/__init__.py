"""Rows that `exchange_pack` has made on all ranks, as the experts of one rank take them."""

from __future__ import annotations

import torch

from engine.ops import requires
from engine.ops.registry import Impl, Op


def exchange_unpack(
    rows: torch.Tensor, top_k: int, rank: int, slots_per_rank: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """rows: int32 [R, words of x + 2 k]. Returns (x [R, d] in `dtype`, ids int64 [R, k]: places of slots on this rank, -1 for others;
    weights fp32 [R, k]). Rank r holds slots [r, r + 1) * slots_per_rank."""
    words, slots, weights = rows.split((rows.shape[1] - 2 * top_k, top_k, top_k), dim=1)
    return words.contiguous().view(dtype), places_here(slots, rank, slots_per_rank), weights.contiguous().view(torch.float32)


def places_here(slots: torch.Tensor, rank: int, slots_per_rank: int) -> torch.Tensor:
    """Slots of the whole group, -1 for none -> places on this rank, int64, -1 for all others."""
    places = slots.long() - rank * slots_per_rank
    return torch.where((slots >= 0) & (places >= 0) & (places < slots_per_rank), places, -1)


OP = Op("exchange_unpack", exchange_unpack, backends={"triton": Impl("engine.ops.exchange_unpack.triton", requires.triton)})

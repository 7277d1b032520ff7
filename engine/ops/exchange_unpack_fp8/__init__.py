"""Rows that `exchange_pack_fp8` has made on all ranks, as the experts of one rank take them."""

from __future__ import annotations

import torch

from engine.model.quantized import FP8_BLOCK
from engine.ops import requires
from engine.ops.exchange_unpack import places_here
from engine.ops.registry import Impl, Op


def exchange_unpack_fp8(
    rows: torch.Tensor, width: int, top_k: int, rank: int, slots_per_rank: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """rows: int32 [R, row_words(width, k)]. Returns (codes e4m3 [R, width], scales fp32 [R, width / 128], which stay where they are;
    ids int64 [R, k]: places of slots on this rank, -1 for others; weights fp32 [R, k]). Rank r holds slots [r, r + 1) * slots_per_rank."""
    slots, weights = labels(rows, width, top_k)
    return *values(rows, width), places_here(slots, rank, slots_per_rank), weights.contiguous().view(torch.float32)


def labels(rows: torch.Tensor, width: int, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Slots and bits of the weights, int32 [R, k], in place."""
    first = width // 4 + width // FP8_BLOCK
    return rows[:, first : first + top_k], rows[:, first + top_k : first + 2 * top_k]


def values(rows: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales, in place."""
    words = width // 4
    return rows[:, :words].view(torch.float8_e4m3fn), rows[:, words : words + width // FP8_BLOCK].view(torch.float32)


OP = Op("exchange_unpack_fp8", exchange_unpack_fp8, backends={"triton": Impl("engine.ops.exchange_unpack_fp8.triton", requires.triton)})

"""Rows that have come for each expert, mostly empty room behind them -> the rows alone, one after the other."""

from __future__ import annotations

import torch

from engine.model.quantized import FP8_BLOCK
from engine.ops import requires
from engine.ops.registry import Impl, Op


def exchange_take(
    codes: torch.Tensor, scales: torch.Tensor, counts: torch.Tensor, most: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """codes: e4m3 [E, room, d], contiguous; scales: fp32 powers of two [E, room, d / 128], strides of any order; counts: int32 [E], rows
    that have come for each expert, at most `most` in all. What is in the room behind them may be anything.

    Returns (x bf16 [most, d], exact; ids int64 [most, 1], the expert; places int64 [most], expert * room + row). Rows past the last are 0,
    -1 and -1."""
    ends = counts.long().cumsum(0)
    number = torch.arange(most, device=codes.device)
    is_row = number < ends[-1]
    expert = torch.where(is_row, torch.searchsorted(ends, number, right=True), 0)
    row = torch.where(is_row, number - (ends - counts)[expert], 0)
    found = codes.view(torch.uint8)[expert, row].view(codes.dtype).float().unflatten(1, (-1, FP8_BLOCK))
    values = (found * scales[expert, row][..., None]).flatten(1)
    places = torch.where(is_row, expert * codes.shape[1] + row, -1)
    return torch.where(is_row[:, None], values, 0.0).bfloat16(), torch.where(is_row, expert, -1)[:, None], places


OP = Op("exchange_take", exchange_take, backends={"triton": Impl("engine.ops.exchange_take.triton", requires.triton)})

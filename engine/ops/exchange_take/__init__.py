"""Rows that have come for each expert, mostly empty room behind them -> the rows alone, one after the other."""

from __future__ import annotations

import torch

from engine.ops import requires
from engine.ops.registry import Impl, Op

Taken = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def exchange_take(codes: torch.Tensor, scales: torch.Tensor, counts: torch.Tensor, most: int) -> Taken:
    """codes: e4m3 [E, room, d], contiguous; scales: fp32 powers of two [E, room, d / 128], strides of any order; counts: int32 [E], rows
    that have come for each expert, at most `most` in all. What is in the room behind them may be anything.

    Returns (codes [most, d], scale [most, d / 128], both contiguous; ids int64 [most, 1], the expert; weights fp32 [most, 1], ones; places
    int64 [most], expert * room + row). Rows past the last have ids and places of -1, and codes and scales that may be anything."""
    ends = counts.long().cumsum(0)
    number = torch.arange(most, device=codes.device)
    is_row = number < ends[-1]
    expert = torch.where(is_row, torch.searchsorted(ends, number, right=True), 0)
    row = torch.where(is_row, number - (ends - counts)[expert], 0)
    found = codes.view(torch.uint8)[expert, row].view(codes.dtype)
    places = torch.where(is_row, expert * codes.shape[1] + row, -1)
    ones = torch.ones(most, 1, device=codes.device)
    return found, scales[expert, row].contiguous(), torch.where(is_row, expert, -1)[:, None], ones, places


OP = Op("exchange_take", exchange_take, backends={"triton": Impl("engine.ops.exchange_take.triton", requires.triton)})

"""A prompt's tokens before their way to the ranks that hold their experts: `exchange_slots`, and their values in FP8."""

from __future__ import annotations

import torch

from engine.ops import requires
from engine.ops.exchange_slots import exchange_slots
from engine.ops.fp8_linear import quantize_rows
from engine.ops.registry import Impl, Op


def exchange_slots_fp8(
    x: torch.Tensor, ids: torch.Tensor, positions: torch.Tensor, table: torch.Tensor, turns: torch.Tensor, load: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x: [T, d] bf16, d a multiple of 128; the others as `exchange_slots` takes them. Returns what `quantize_rows` makes of x (codes e4m3
    [T, d], scale fp32 [T, d / 128], both contiguous), and the slots."""
    rows = quantize_rows(x)
    return rows.codes, rows.scale.contiguous(), exchange_slots(ids, positions, table, turns, load)


OP = Op("exchange_slots_fp8", exchange_slots_fp8, backends={"triton": Impl("engine.ops.exchange_slots_fp8.triton", requires.triton)})

"""A token on its way to the ranks that hold its experts, as one row: its values, the slots of its experts, and their weights."""

from __future__ import annotations

import torch

from engine.ops import requires
from engine.ops.registry import Impl, Op
from engine.parallel.expert_placement import choose_slots, count_tokens


def exchange_pack(
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    positions: torch.Tensor,
    table: torch.Tensor,
    turns: torch.Tensor,
    load: torch.Tensor,
) -> torch.Tensor:
    """x: [T, d] bf16 (d even) or fp32; ids: int64 [T, k], experts; weights: fp32 [T, k]; positions: int64 [T], -1 for a row that only
    fills up: its slots are -1, so that no expert is read for it. table, turns and load (int64 [E, C], [E], [E]) are a SlotChoice's; load
    counts the rows with a position.

    Returns int32 [T, words of x + 2 k]: x's bytes, then slots, then the weights' bits."""
    count_tokens(load, ids, positions)
    slots = torch.where(positions[:, None] >= 0, choose_slots(ids, table, turns), -1)
    return torch.cat((x.view(torch.int32), slots.int(), weights.view(torch.int32)), dim=1)


OP = Op("exchange_pack", exchange_pack, backends={"triton": Impl("engine.ops.exchange_pack.triton", requires.triton)})

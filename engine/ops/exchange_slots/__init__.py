"""The slots to which tokens go for their experts, and how many tokens each expert has had."""

from __future__ import annotations

import torch

from engine.ops import requires
from engine.ops.registry import Impl, Op
from engine.parallel.expert_placement import choose_slots, count_tokens


def exchange_slots(
    ids: torch.Tensor, positions: torch.Tensor, table: torch.Tensor, turns: torch.Tensor, load: torch.Tensor
) -> torch.Tensor:
    """ids: int64 [T, k], experts; positions: int64 [T], -1 for a row that only fills up. table, turns and load (int64 [E, C], [E], [E]) are
    a SlotChoice's; load counts the rows with a position. Returns int64 [T, k]; -1 for rows without a position."""
    count_tokens(load, ids, positions)
    return torch.where(positions[:, None] >= 0, choose_slots(ids, table, turns), -1)


OP = Op("exchange_slots", exchange_slots, backends={"triton": Impl("engine.ops.exchange_slots.triton", requires.triton)})

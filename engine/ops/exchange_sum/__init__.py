"""The sum over a token's experts, of the ranks' parts of it."""

from __future__ import annotations

import torch

from engine.ops import requires
from engine.ops.registry import Impl, Op


def exchange_sum(mine: torch.Tensor, others: torch.Tensor, rank: int) -> torch.Tensor:
    """mine: bf16 [T, d], what rank `rank` has summed up; others: bf16 [ranks, T, d], what each of the others has, others[rank] undefined.
    Returns fp32 [T, d], added up in fp32 in the order of ranks: the same whoever adds."""
    parts = [mine if number == rank else part for number, part in enumerate(others.unbind())]
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part.float()
    return total


OP = Op("exchange_sum", exchange_sum, backends={"triton": Impl("engine.ops.exchange_sum.triton", requires.triton)})

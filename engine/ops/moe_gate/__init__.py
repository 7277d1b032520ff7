"""Router: which experts a token goes to, and with what weights (spec 2.5)."""

from __future__ import annotations

import torch

from engine.ops import requires
from engine.ops.registry import Impl, Op


def moe_gate(
    logits: torch.Tensor, bias: torch.Tensor | None, table: torch.Tensor | None, token_ids: torch.Tensor, top_k: int, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """logits: fp32 [T, E]. Score layers give `bias` (fp32 [E], used for selection only), hash layers `table` (int64 [vocab, top_k]), whose
    rows `token_ids` (int64 [T]) name the experts.

    Returns (expert ids int64 [T, top_k], weights fp32 [T, top_k] = scaling * score / sum of selected scores), where score =
    sqrt(softplus(logit)). Of equal biased scores the lower id is selected.
    """
    scores = torch.nn.functional.softplus(logits.double()).sqrt().float()
    if table is not None:
        ids = table[token_ids]
    else:
        assert bias is not None
        ids = torch.sort(scores + bias, dim=1, descending=True, stable=True).indices[:, :top_k]
    picked = scores.gather(1, ids).double()
    return ids, (picked / (picked.sum(1, keepdim=True) + 1e-20) * scaling).float()


OP = Op("moe_gate", moe_gate, backends={"triton": Impl("engine.ops.moe_gate.triton", requires.triton)})

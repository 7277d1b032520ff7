"""Scores of compressed entries for each query, by the lightning indexer (spec 2.4)."""

from __future__ import annotations

import torch

from engine.ops.registry import Op


def index_logits(q: torch.Tensor, weights: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """score[t, s] = sum over heads h of weights[t, h] * relu(q[t, h] . keys[s]).

    q: [T, Hi, Di]; weights: fp32 [T, Hi] (may be negative; both scales folded in); keys: fp32 [S, Di] shared by all queries, or
    [T, S, Di] one set a query. Returns fp32 [T, S]. Visibility is the caller's.
    """
    dots = torch.einsum("thd,sd->ths" if keys.dim() == 2 else "thd,tsd->ths", q.double(), keys.double())
    return torch.einsum("th,ths->ts", weights.double(), dots.relu_()).float()


OP = Op("index_logits", index_logits)

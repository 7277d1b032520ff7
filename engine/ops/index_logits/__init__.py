"""Scores of compressed entries for each query, by the lightning indexer (spec 2.4)."""

from __future__ import annotations

import torch

from engine.batch import TokenPlaces
from engine.cache.arena import RowPool
from engine.ops import requires
from engine.ops.registry import Impl, Op


def index_logits(q: torch.Tensor, weights: torch.Tensor, keys: RowPool, places: TokenPlaces, num_entries: int) -> torch.Tensor:
    """score[t, s] = sum over heads h of weights[t, h] * relu(q[t, h] . key s of t's sequence).

    q: [T, Hi, Di] and weights: fp32 [T, Hi] (may be negative) as index_query gives them. Returns fp32 [T, num_entries]; what stands at
    entries s >= (position + 1) // 4, which the query does not see, is unspecified.
    """
    scores = torch.empty(len(q), num_entries, device=q.device)
    per_page, entry = keys.data.shape[1], torch.arange(num_entries, device=q.device)
    for sequence in torch.unique(places.sequences_T).tolist():
        rows = torch.nonzero(places.sequences_T == sequence)[:, 0]
        pages = places.page_table_SP[sequence, entry // per_page].long().clamp(min=0)
        dots = torch.einsum("thd,sd->ths", q[rows].double(), keys.read(pages, entry % per_page).double())
        scores[rows] = torch.einsum("th,ths->ts", weights[rows].double(), dots.relu_()).float()
    return scores


OP = Op(
    "index_logits",
    index_logits,
    backends={
        "deep_gemm": Impl("engine.ops.index_logits.deep_gemm", requires.deep_gemm, requires.fp8_index),
        "triton": Impl("engine.ops.index_logits.triton", requires.triton),
    },
)

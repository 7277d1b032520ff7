"""Selection of compressed entries: the k best visible ones, exactly (spec 2.4)."""

from __future__ import annotations

import torch

from engine.ops import requires
from engine.ops.registry import Impl, Op


def index_topk(logits: torch.Tensor, num_visible: torch.Tensor, k: int) -> torch.Tensor:
    """logits: fp32 [T, S]; num_visible: int64 [T], entries [0, num_visible) may be taken. Returns int32 [T, k]: the set of the k
    highest (all visible ones if there are fewer), order unspecified, -1 in unused places. Of equal scores the lower index is taken.
    """
    entries = logits.shape[1]
    index = torch.arange(entries, device=logits.device)
    masked = logits.masked_fill(index >= num_visible[:, None], -torch.inf)
    best = torch.sort(masked, dim=1, descending=True, stable=True).indices[:, :k]
    best = best.masked_fill(torch.arange(best.shape[1], device=logits.device) >= num_visible[:, None], -1)
    return torch.nn.functional.pad(best, (0, k - best.shape[1]), value=-1).int()


OP = Op(
    "index_topk",
    index_topk,
    backends={
        "cuda": Impl("engine.ops.index_topk.cuda", requires.nvrtc),
        "triton": Impl("engine.ops.index_topk.triton", requires.triton),
    },
)

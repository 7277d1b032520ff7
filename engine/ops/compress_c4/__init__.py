"""Ratio-4 compression: each block of 4 tokens becomes one entry, pooled over 8 rows: the block before and this one (spec 2.3)."""

from __future__ import annotations

import torch

from engine.ops.registry import Op


def compress_c4(kv: torch.Tensor, score: torch.Tensor) -> torch.Tensor:
    """kv, score: fp32 [S, n + 1, 4, 2, D]: rows of n + 1 consecutive blocks; dim 3 is series A ("for the next block") and B
    ("for this block"); scores include ape. Returns fp32 [S, n, D], entries of the last n blocks:

        softmax per channel over the 4 A rows of the block before and the 4 B rows of the block; weighted sum of kv.

    A neutral row (score -FLT_MAX, kv 0) weighs nothing: so it is before the first block of a sequence.
    """
    rows = torch.cat((kv[:, :-1, :, 0], kv[:, 1:, :, 1]), dim=2).double()
    scores = torch.cat((score[:, :-1, :, 0], score[:, 1:, :, 1]), dim=2).double()
    return (torch.softmax(scores, dim=2) * rows).sum(2).float()


OP = Op("compress_c4", compress_c4)

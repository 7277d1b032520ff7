"""Hyper-connections, after a sublayer: spread its output over the streams and mix the old ones (spec 2.1)."""

from __future__ import annotations

import torch

from engine.ops import requires
from engine.ops.registry import Impl, Op


def hc_post(y: torch.Tensor, h: torch.Tensor, post: torch.Tensor, comb: torch.Tensor) -> torch.Tensor:
    """h'_k = post_k y + sum_j comb[j, k] h_j: the sum is over comb's first index.

    y: [T, d]; h: [T, M, d], the streams that fed hc_pre; post: [T, M] fp32; comb: [T, M, M] fp32. Returns h's shape and dtype.
    """
    mixed = comb.double().transpose(1, 2) @ h.double()
    return (mixed + post.double().unsqueeze(2) * y.double().unsqueeze(1)).to(h.dtype)


OP = Op("hc_post", hc_post, backends={"triton": Impl("engine.ops.hc_post.triton", requires.triton)})

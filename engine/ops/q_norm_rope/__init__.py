"""Query heads: RMS-normed without weight, then rotated (spec 2.2)."""

from __future__ import annotations

import torch

from engine.model.rope import rotate
from engine.ops import requires
from engine.ops.registry import Impl, Op


def q_norm_rope(q: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, eps: float) -> torch.Tensor:
    """q: [T, H, D] bf16 or fp32; cos, sin: fp32 [T, rope / 2]. Returns q's shape and dtype, rounded once at the end. The caller
    gives q up: a backend may change it in place and return it."""
    q64 = q.double()
    return rotate(q64 * torch.rsqrt(q64.square().mean(-1, keepdim=True) + eps), cos, sin).to(q.dtype)


OP = Op("q_norm_rope", q_norm_rope, backends={"triton": Impl("engine.ops.q_norm_rope.triton", requires.triton)})

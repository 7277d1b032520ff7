"""The key-value vector of a token or a compressed entry: RMS-normed over all channels, then rotated (spec 2.2, 2.3)."""

from __future__ import annotations

import torch

from engine.model.rope import rotate
from engine.ops.registry import Op


def kv_norm_rope(
    kv: torch.Tensor, weight: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, eps: float, out_dtype: torch.dtype
) -> torch.Tensor:
    """kv: [T, D], any float dtype; weight: [D]; cos, sin: fp32 [T, rope / 2]. Returns [T, D] in out_dtype, rounded once.

    Quantisation follows when the row is stored (engine/cache/rows.py)."""
    kv64 = kv.double()
    normed = kv64 * torch.rsqrt(kv64.square().mean(-1, keepdim=True) + eps) * weight.double()
    return rotate(normed, cos, sin).to(out_dtype)


OP = Op("kv_norm_rope", kv_norm_rope)

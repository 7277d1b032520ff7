"""The key-value vector of a token: RMS-normed over all channels, rotated, rounded, stored (spec 2.2)."""

from __future__ import annotations

import torch

from engine.cache.arena import RowPool
from engine.model.rope import rotate
from engine.ops import requires
from engine.ops.registry import Impl, Op


def norm_rope(
    x: torch.Tensor, weight: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, eps: float, out_dtype: torch.dtype
) -> torch.Tensor:
    """x: [T, D], any float dtype; weight: [D]; cos, sin: fp32 [T, rope / 2]. Returns [T, D] in out_dtype, rounded once."""
    x64 = x.double()
    normed = x64 * torch.rsqrt(x64.square().mean(-1, keepdim=True) + eps) * weight.double()
    return rotate(normed, cos, sin).to(out_dtype)


def kv_store(
    kv: torch.Tensor,
    weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
    pool: RowPool,
    units: torch.Tensor,
    rows: torch.Tensor,
) -> torch.Tensor:
    """kv: [T, D] bf16 or fp32; weight: [D]; cos, sin: fp32 [T, rope / 2]; units, rows: int64 [T], where in the pool each goes, unit -1
    nowhere. Values are rounded to kv's dtype before the pool's format takes them. Returns the values as stored, [T, D] in pool.form.dtype.
    """
    data, scale = pool.form.encode(norm_rope(kv, weight, cos, sin, eps, kv.dtype))
    wanted = units >= 0
    pool.data[units[wanted], rows[wanted]] = data[wanted]
    pool.scale[units[wanted], rows[wanted]] = scale[wanted]
    return pool.form.decode(data, scale)


OP = Op("kv_store", kv_store, backends={"triton": Impl("engine.ops.kv_store.triton", requires.triton)})

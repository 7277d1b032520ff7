"""Hyper-connections between two sublayers: the post of one and the pre of the next, in one op (spec 2.1)."""

from __future__ import annotations

import torch

from engine.model.quantized import QuantizedRows
from engine.ops import requires
from engine.ops.hc_post import hc_post
from engine.ops.hc_pre import hc_pre, pack
from engine.ops.registry import Impl, Op


def hc_post_pre(
    y: torch.Tensor,
    more: torch.Tensor | None,
    h: torch.Tensor,
    post: torch.Tensor,
    comb: torch.Tensor,
    fn: torch.Tensor,
    base: torch.Tensor,
    scale: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_eps: float,
    hc_eps: float,
    sinkhorn_iters: int,
    is_quantized: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, QuantizedRows | None, torch.Tensor, torch.Tensor]:
    """`hc_post(y, h, post, comb)`, then `hc_pre` of its result with the next sublayer's parameters.

    With `more` ([T, d] in h's dtype) y is fp32 or in h's dtype, and what is spread is their fp32 sum, rounded to h's dtype.

    Returns the streams [T, M, d], and what `hc_pre` returns, for the next sublayer."""
    streams = hc_post(y if more is None else (y.float() + more).to(h.dtype), h, post, comb)
    return streams, *hc_pre(streams, fn, base, scale, norm_weight, norm_eps, hc_eps, sinkhorn_iters, is_quantized)


OP = Op("hc_post_pre", hc_post_pre, pack, {"triton": Impl("engine.ops.hc_post_pre.triton", requires.triton)})

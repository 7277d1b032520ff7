"""Hyper-connections, at the end: streams to one hidden state (spec 2.1)."""

from __future__ import annotations

import torch

from engine.ops import requires
from engine.ops.hc_pre import pack
from engine.ops.registry import Impl, Op


def hc_head(h: torch.Tensor, fn: torch.Tensor, base: torch.Tensor, scale: torch.Tensor, norm_eps: float, hc_eps: float) -> torch.Tensor:
    """h: [T, M, d]; fn: [M, M d] fp32; base: [M]; scale: [1]. Returns [T, d] in h's dtype. No Sinkhorn here."""
    flat = h.double().flatten(1)
    mixed = (flat @ fn.double().T) * torch.rsqrt(flat.square().mean(1, keepdim=True) + norm_eps)
    pre = torch.sigmoid(mixed * scale.double() + base.double()) + hc_eps
    return torch.einsum("tm,tmd->td", pre, h.double()).to(h.dtype)


OP = Op("hc_head", hc_head, pack, {"triton": Impl("engine.ops.hc_head.triton", requires.triton)})

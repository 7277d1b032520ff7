"""Manifold-constrained hyper-connections, before a sublayer: mix four streams into one, and norm it (spec 2.1)."""

from __future__ import annotations

import torch

from engine.model.quantized import QuantizedRows
from engine.ops import requires
from engine.ops.fp8_linear import quantize_rows
from engine.ops.registry import Impl, Op


def pack(fn: torch.Tensor) -> torch.Tensor:
    """fn of a checkpoint -> fp32."""
    return fn.float()


def hc_pre(
    h: torch.Tensor,
    fn: torch.Tensor,
    base: torch.Tensor,
    scale: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_eps: float,
    hc_eps: float,
    sinkhorn_iters: int,
    is_quantized: bool = False,
) -> tuple[torch.Tensor, QuantizedRows | None, torch.Tensor, torch.Tensor]:
    """h: [T, M, d] streams (M = hc_mult). fn: [(2 + M) M, M d] fp32; base: [(2 + M) M]; scale: [3]. norm_weight: [d].

    Returns (x [T, d] in h's dtype: the mixed stream, rounded, then RMS-normed; what `quantize_rows` makes of x, or None; post [T, M]
    fp32; comb [T, M, M] fp32).
    Columns of fn: pre M, post M, comb M x M row-major. After the softmax over comb's last dim and + hc_eps come
    `sinkhorn_iters` column normalisations with a row normalisation between each two.
    """
    tokens, mult, _ = h.shape
    flat = h.double().flatten(1)
    mixed = (flat @ fn.double().T) * torch.rsqrt(flat.square().mean(1, keepdim=True) + norm_eps)
    scale64, base64 = scale.double(), base.double()
    pre = torch.sigmoid(mixed[:, :mult] * scale64[0] + base64[:mult]) + hc_eps
    post = 2 * torch.sigmoid(mixed[:, mult : 2 * mult] * scale64[1] + base64[mult : 2 * mult])
    comb = torch.softmax((mixed[:, 2 * mult :] * scale64[2] + base64[2 * mult :]).view(tokens, mult, mult), dim=2) + hc_eps
    comb = comb / (comb.sum(1, keepdim=True) + hc_eps)
    for _ in range(sinkhorn_iters - 1):
        comb = comb / (comb.sum(2, keepdim=True) + hc_eps)
        comb = comb / (comb.sum(1, keepdim=True) + hc_eps)
    x = torch.einsum("tm,tmd->td", pre, h.double()).to(h.dtype).double()
    x = (x * torch.rsqrt(x.square().mean(1, keepdim=True) + norm_eps) * norm_weight.double()).to(h.dtype)
    return x, quantize_rows(x) if is_quantized else None, post.float(), comb.float()


OP = Op("hc_pre", hc_pre, pack, {"triton": Impl("engine.ops.hc_pre.triton", requires.triton)})

"""hc_post_pre with the kernels of hc_pre: new streams are made, written and projected in one pass."""

from __future__ import annotations

import torch

from engine.model.quantized import QuantizedRows
from engine.ops.hc_pre.triton import cut, launch, pack

__all__ = ["pack", "run"]


def run(
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
    """As the reference, with packed fn; all contiguous."""
    plan = cut(len(h), h.shape[2], h.dtype)
    return launch(h, (y, more, post, comb), fn, base, scale, norm_weight, (norm_eps, hc_eps), sinkhorn_iters, plan, is_quantized)

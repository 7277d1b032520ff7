"""hc_head with the kernels of hc_pre: the same projection and mix, without norm, post gates and Sinkhorn."""

from __future__ import annotations

import torch

from engine.ops.hc_pre.triton import cut, launch, pack

__all__ = ["pack", "run"]


def run(h: torch.Tensor, fn: torch.Tensor, base: torch.Tensor, scale: torch.Tensor, norm_eps: float, hc_eps: float) -> torch.Tensor:
    """As the reference, with packed fn and contiguous h."""
    return launch(h, None, fn, base, scale, None, (norm_eps, hc_eps), 0, cut(len(h), h.shape[2], h.dtype))[1]

"""RMSNorm over the last dim."""

from __future__ import annotations

import torch

from engine.model.quantized import QuantizedRows
from engine.ops import requires
from engine.ops.fp8_linear import quantize_rows
from engine.ops.registry import Impl, Op


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, is_quantized: bool = False) -> torch.Tensor | QuantizedRows:
    """x * rsqrt(mean(x^2) + eps) * weight, rounded once.

    x: [..., K] bf16 or fp32. weight: [K], any float dtype. Returns x's shape and dtype; or, for [T, K], what `quantize_rows` makes of that.
    """
    x64 = x.double()
    normed = x64 * torch.rsqrt(x64.square().mean(-1, keepdim=True) + eps)
    rounded = (normed * weight.double()).to(x.dtype)
    return quantize_rows(rounded) if is_quantized else rounded


OP = Op("rms_norm", rms_norm, backends={"triton": Impl("engine.ops.rms_norm.triton", requires.triton)})

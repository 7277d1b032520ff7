"""y_g = x_g W_g^T for each group of heads: the first half of the output projection (spec 2.2)."""

from __future__ import annotations

import torch

from engine.model.quantized import QuantizedWeight, Weight
from engine.ops import requires
from engine.ops.registry import Impl, Op

FEW_TOKENS = 64
"""Up to so many, a backend that has the weights in a larger form besides is quicker without it."""


def grouped_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x: [T, G, K] bf16 or fp32, not quantised; weight: [G, N, K] as `pack` made it. Returns [T, G, N] in x's dtype."""
    return torch.einsum("tgk,gnk->tgn", x.double(), weight).to(x.dtype)


def pack(weight: Weight, groups: int) -> torch.Tensor:
    """[G N, K], of a checkpoint -> float64 [G, N, K]."""
    plain = weight.dequantize(torch.float64) if isinstance(weight, QuantizedWeight) else weight.double()
    return plain.unflatten(0, (groups, -1))


OP = Op("grouped_linear", grouped_linear, pack, {"triton": Impl("engine.ops.grouped_linear.triton", requires.triton)})

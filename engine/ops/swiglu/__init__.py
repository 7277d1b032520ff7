"""Clamped SwiGLU (spec 2.5)."""

from __future__ import annotations

import torch

from engine.model.quantized import QuantizedRows
from engine.ops import requires
from engine.ops.fp8_linear import quantize_rows
from engine.ops.registry import Impl, Op


def clamped_swiglu(gate: torch.Tensor, up: torch.Tensor, limit: float, out_dtype: torch.dtype) -> torch.Tensor:
    """As `swiglu`, without quantisation."""
    gate64, up64 = gate.double().clamp(max=limit), up.double().clamp(-limit, limit)
    return (gate64 * torch.sigmoid(gate64) * up64).to(out_dtype)


def swiglu(
    gate: torch.Tensor, up: torch.Tensor, limit: float, out_dtype: torch.dtype, is_quantized: bool = False
) -> torch.Tensor | QuantizedRows:
    """silu(min(gate, limit)) * clamp(up, -limit, limit). gate, up: [T, I], any float dtype. Returns [T, I] in out_dtype, or what
    `quantize_rows` makes of that."""
    rounded = clamped_swiglu(gate, up, limit, out_dtype)
    return quantize_rows(rounded) if is_quantized else rounded


OP = Op("swiglu", swiglu, backends={"triton": Impl("engine.ops.swiglu.triton", requires.triton)})

"""Clamped SwiGLU (spec 2.5)."""

from __future__ import annotations

import torch

from engine.ops import requires
from engine.ops.registry import Impl, Op


def swiglu(gate: torch.Tensor, up: torch.Tensor, limit: float, out_dtype: torch.dtype) -> torch.Tensor:
    """silu(min(gate, limit)) * clamp(up, -limit, limit). gate, up: [T, I], any float dtype. Returns [T, I] in out_dtype."""
    gate64, up64 = gate.double().clamp(max=limit), up.double().clamp(-limit, limit)
    return (gate64 * torch.sigmoid(gate64) * up64).to(out_dtype)


OP = Op("swiglu", swiglu, backends={"triton": Impl("engine.ops.swiglu.triton", requires.triton)})

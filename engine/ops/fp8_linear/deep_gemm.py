"""FP8 products of many rows through DeepGEMM (package sgl-deep-gemm); few rows through the Triton kernel, which streams weights better.

Packed weights are the Triton backend's: DeepGEMM reads the same codes and scales.
"""

from __future__ import annotations

import deep_gemm
import torch

from engine.model.quantized import QuantizedRows, QuantizedWeight
from engine.ops.fp8_linear import triton

FEW_ROWS = 32
"""So many rows go to the Triton kernel."""


def run(x: torch.Tensor | QuantizedRows, weight: triton.PackedWeight) -> torch.Tensor:
    """As the reference, x in bf16, or quantised from it."""
    flat = triton.flat_rows(x)
    padded = len(weight.codes)
    out = torch.empty(len(flat), padded, dtype=flat.dtype, device=flat.device)
    if 0 < len(flat) <= FEW_ROWS and padded == weight.shape[0]:
        triton.run_few(flat, weight, out)
    elif len(flat):
        rows = triton.quantized(flat)
        deep_gemm.fp8_gemm_nt((rows.codes, rows.scale), (weight.codes, weight.scale), out)
    out = out[:, : weight.shape[0]]
    return out.unflatten(0, x.shape[:-1]) if isinstance(x, torch.Tensor) else out


def pack(weight: QuantizedWeight) -> triton.PackedWeight:
    return triton.pack(weight)

"""FP8 products of many rows through DeepGEMM (package sgl-deep-gemm); few rows through the Triton kernel, which streams weights better.

Packed weights are the Triton backend's: DeepGEMM reads the same codes and scales.
"""

from __future__ import annotations

import deep_gemm
import torch

from engine.model.quantized import QuantizedWeight
from engine.ops.fp8_linear import triton

FEW_ROWS = 32
"""So many rows go to the Triton kernel."""
SCALE_ALIGNMENT = 4
"""Columns of activation scales are read by the bulk copy engine: 16 bytes."""


def run(x: torch.Tensor, weight: triton.PackedWeight) -> torch.Tensor:
    """As the reference, x in bf16."""
    flat = x.flatten(0, -2).contiguous()
    padded = len(weight.codes)
    out = torch.empty(len(flat), padded, dtype=x.dtype, device=x.device)
    if 0 < len(flat) <= FEW_ROWS and padded == weight.shape[0]:
        triton.run_few(flat, weight, out)
    elif len(flat):
        activations = triton.act_quant(flat, weight.scale.shape[1], SCALE_ALIGNMENT)
        deep_gemm.fp8_gemm_nt(activations, (weight.codes, weight.scale), out)
    return out[:, : weight.shape[0]].unflatten(0, x.shape[:-1])


def pack(weight: QuantizedWeight) -> triton.PackedWeight:
    return triton.pack(weight)

"""Routed experts as the Triton backend has them, but for many rows: there DeepGEMM (package sgl-deep-gemm) multiplies."""

from __future__ import annotations

import deep_gemm
import torch

from engine.model.quantized import QuantizedRows, Weight
from engine.ops.moe_experts import Rooms, hopper, triton
from engine.ops.moe_experts.tiles import PackedExperts, pack_experts

MANY_ROWS, MANY_HOPPER_ROWS, MANY_FP8_ROWS = 144, 224, 36
"""Rows an expert, on average, from which blocks of 128 pay: of experts to be widened first, of those that Hopper's own kernels would take
(hopper.py), and of FP8."""


def run(
    x: torch.Tensor | QuantizedRows | Rooms,
    ids: torch.Tensor | None,
    weights: torch.Tensor | None,
    experts: PackedExperts,
    limit: float,
    sum_dtype: torch.dtype | None = torch.float32,
    among: int | None = None,
) -> torch.Tensor:
    """As the reference, x in bf16, or quantised from it; sum_dtype float32 or bfloat16."""
    least = MANY_FP8_ROWS if not experts.fp4 else MANY_HOPPER_ROWS if hopper.serves(experts) else MANY_ROWS
    few = ids is None or ids.numel() < least * (among or experts.num_experts)
    if isinstance(x, Rooms) or ids is None or weights is None or few or not experts.widens:
        return triton.run(x, ids, weights, experts, limit, sum_dtype, among)
    config = triton.Many(block_m=deep_gemm.get_mk_alignment_for_contiguous_layout())
    return triton.run_with(x, ids, weights, experts, limit, sum_dtype, config, multiply)


def multiply(
    codes: torch.Tensor,
    scales: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    slots: triton.Slots,
    config: triton.Many,
) -> torch.Tensor:
    """triton.Product."""
    out = torch.empty(len(codes), weight.shape[1], dtype=torch.bfloat16, device=codes.device)
    # Told where each expert's rows end, it visits no block without rows; of those there are as many as pairs whose expert is elsewhere.
    deep_gemm.m_grouped_fp8_gemm_nt_contiguous((codes, scales), (weight, weight_scale), out, slots.ends, use_psum_layout=True)
    return out


def pack(w1: list[Weight], w2: list[Weight], w3: list[Weight], quantize_activations: bool) -> PackedExperts:
    """As the Triton backend's."""
    return pack_experts(w1, w2, w3, quantize_activations)


def widen(experts: PackedExperts) -> PackedExperts:
    """As the Triton backend's."""
    return triton.widen(experts)

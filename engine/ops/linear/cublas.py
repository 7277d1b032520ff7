"""Products with unquantised weights through cuBLAS; fp32 results of bf16 operands come from fp32 accumulators, unrounded."""

from __future__ import annotations

import torch


def run(x: torch.Tensor, weight: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    """As the reference. bf16 with bf16 runs on the matrix units; any other pair in fp32."""
    flat = x.flatten(0, -2)
    if x.dtype == weight.dtype == torch.bfloat16 and out_dtype in (torch.bfloat16, torch.float32):
        out = torch.mm(flat, weight.T, out_dtype=out_dtype) if flat.is_cuda else (flat.float() @ weight.T.float()).to(out_dtype)
    else:
        out = (flat.float() @ weight.T.float()).to(out_dtype)
    return out.unflatten(0, x.shape[:-1])


def pack(weight: torch.Tensor) -> torch.Tensor:
    """bf16 where that is exact (bf16 weights, and FP8 ones dequantised), else fp32."""
    if weight.dtype == torch.bfloat16:
        return weight
    rounded = weight.bfloat16()
    return rounded if torch.equal(rounded.to(weight.dtype), weight) else weight.float()

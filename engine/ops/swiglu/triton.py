"""Clamped SwiGLU in one pass; gate and up may be halves of one matrix (rows further apart than they are long)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.ops.triton_rounding import to_bf16

CHANNELS = 1024


@triton.jit
def swiglu_kernel(gate_ptr, up_ptr, out_ptr, width, gate_stride, up_stride, limit, CHANNELS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < width
    gate = tl.minimum(tl.load(gate_ptr + row * gate_stride + channel, mask=inside, other=0.0).to(tl.float32), limit)
    up = tl.load(up_ptr + row * up_stride + channel, mask=inside, other=0.0).to(tl.float32)
    up = tl.minimum(tl.maximum(up, -limit), limit)
    out = gate / (1.0 + tl.exp(-gate)) * up
    if out_ptr.dtype.element_ty == tl.bfloat16:
        out = to_bf16(out)
    tl.store(out_ptr + row * width + channel, out, mask=inside)


def run(gate: torch.Tensor, up: torch.Tensor, limit: float, out_dtype: torch.dtype) -> torch.Tensor:
    """As the reference; gate and up may be bf16, too. out_dtype: bf16 or fp32."""
    rows, width = gate.shape
    gate, up = (part if part.stride(-1) == 1 else part.contiguous() for part in (gate, up))
    out = torch.empty(rows, width, dtype=out_dtype, device=gate.device)
    if rows and width:
        grid = (rows, triton.cdiv(width, CHANNELS))
        swiglu_kernel[grid](gate, up, out, width, gate.stride(0), up.stride(0), limit, CHANNELS=CHANNELS, num_warps=4)
    return out


def _signature(element: str) -> dict[str, str]:
    pointers = {"gate_ptr": f"*{element}", "up_ptr": f"*{element}", "out_ptr": "*bf16"}
    return {**pointers, "width": "i32:16", "gate_stride": "i32:16", "up_stride": "i32:16", "limit": "fp32"}


AOT = [(swiglu_kernel, _signature(element), {"CHANNELS": CHANNELS}, {"num_warps": 4}) for element in ("fp32", "bf16")]

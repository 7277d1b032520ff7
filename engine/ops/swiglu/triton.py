"""Clamped SwiGLU in one pass; gate and up may be halves of one matrix (rows further apart than they are long)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.model.quantized import FP8_BLOCK, QuantizedRows
from engine.ops.triton_rounding import quantize, round_bf16, to_bf16

BLOCK = tl.constexpr(FP8_BLOCK)
CHANNELS = 1024


@triton.jit(do_not_specialize=["scale_stride"])
def swiglu_kernel(
    gate_ptr, up_ptr, out_ptr, scale_ptr, width, out_width, gate_stride, up_stride, scale_stride, limit, CHANNELS: tl.constexpr
):
    """FP8 out: with fp32 scales of 128 channels at row + group * scale_stride."""
    row = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    if out_ptr.dtype.element_ty == tl.float8e4nv:
        channel = tl.reshape(channel, [CHANNELS // BLOCK, BLOCK])
    inside = channel < width
    gate = tl.minimum(tl.load(gate_ptr + row * gate_stride + channel, mask=inside, other=0.0).to(tl.float32), limit)
    up = tl.load(up_ptr + row * up_stride + channel, mask=inside, other=0.0).to(tl.float32)
    up = tl.minimum(tl.maximum(up, -limit), limit)
    out = gate / (1.0 + tl.exp(-gate)) * up
    if out_ptr.dtype.element_ty == tl.float8e4nv:
        group = tl.program_id(1) * (CHANNELS // BLOCK) + tl.arange(0, CHANNELS // BLOCK)[:, None]
        out, out_scale = quantize(round_bf16(out), 1)
        tl.store(scale_ptr + row + group * scale_stride, out_scale, mask=group * BLOCK < out_width)
        inside = channel < out_width
    elif out_ptr.dtype.element_ty == tl.bfloat16:
        out = to_bf16(out)
    tl.store(out_ptr + row * out_width + channel, out, mask=inside)


def run(
    gate: torch.Tensor, up: torch.Tensor, limit: float, out_dtype: torch.dtype, is_quantized: bool = False
) -> torch.Tensor | QuantizedRows:
    """As the reference; gate and up may be bf16, too. out_dtype: bf16 or fp32; quantised from bf16."""
    rows, width = gate.shape
    gate, up = (part if part.stride(-1) == 1 else part.contiguous() for part in (gate, up))
    assert not is_quantized or out_dtype == torch.bfloat16, f"{out_dtype}"
    out = (
        QuantizedRows.empty(rows, width, out_dtype, gate.device)
        if is_quantized
        else torch.empty(gate.shape, dtype=out_dtype, device=gate.device)
    )
    if rows and width:
        values, scale = (out.codes, out.scale) if isinstance(out, QuantizedRows) else (out, out)
        swiglu_kernel[(rows, triton.cdiv(width, CHANNELS))](
            gate, up, values, scale, width, values.shape[1], gate.stride(0), up.stride(0), scale.stride(1), limit,
            CHANNELS=CHANNELS, num_warps=4,
        )  # fmt: skip
    return out


def _signature(element: str, out: str, scale: str) -> dict[str, str]:
    pointers = {"gate_ptr": f"*{element}", "up_ptr": f"*{element}", "out_ptr": out, "scale_ptr": scale}
    strides = dict.fromkeys(("width", "out_width", "gate_stride", "up_stride"), "i32:16")
    return {**pointers, **strides, "scale_stride": "i32", "limit": "fp32"}


AOT = [
    (swiglu_kernel, _signature(*types), {"CHANNELS": CHANNELS}, {"num_warps": 4})
    for types in (("fp32", "*bf16", "*bf16"), ("bf16", "*bf16", "*bf16"), ("bf16", "*fp8e4nv", "*fp32"))
]

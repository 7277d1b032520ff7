"""rms_norm: a program normalises a few short rows, or one long one, held in registers between the sum and the scaling."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.model.quantized import FP8_BLOCK, QuantizedRows
from engine.ops.triton_rounding import quantize, round_bf16

BLOCK = tl.constexpr(FP8_BLOCK)
TILE = 4096
"""Elements of a program, where a row is shorter."""


@triton.jit(do_not_specialize=["rows", "scale_stride"])
def rms_norm_kernel(
    x_ptr, weight_ptr, out_ptr, scale_ptr, rows, width, row_stride, out_width, scale_stride, eps,
    ROWS: tl.constexpr, PADDED_WIDTH: tl.constexpr,
):  # fmt: skip
    """FP8 out: with fp32 scales of 128 channels at row + group * scale_stride."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    channel = tl.arange(0, PADDED_WIDTH)
    kept = (row < rows)[:, None] & (channel < width)[None, :]
    x = tl.load(x_ptr + row[:, None] * row_stride + channel[None, :], mask=kept, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + channel, mask=channel < width, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 1) / width + eps)
    out = x * scale[:, None] * weight[None, :]
    if out_ptr.dtype.element_ty == tl.float8e4nv:
        GROUPS: tl.constexpr = PADDED_WIDTH // BLOCK
        codes, out_scale = quantize(tl.reshape(round_bf16(out), [ROWS * GROUPS, BLOCK]), 1)
        place = tl.arange(0, ROWS * GROUPS)[:, None]
        row, group = (tl.program_id(0) * ROWS + place // GROUPS).to(tl.int64), place % GROUPS
        at = group * BLOCK + tl.arange(0, BLOCK)[None, :]
        tl.store(out_ptr + row * out_width + at, codes, mask=(row < rows) & (at < out_width))
        tl.store(scale_ptr + row + group * scale_stride, out_scale, mask=(row < rows) & (group * BLOCK < out_width))
    else:
        tl.store(out_ptr + row[:, None] * out_width + channel[None, :], out.to(out_ptr.dtype.element_ty), mask=kept)


def run(x: torch.Tensor, weight: torch.Tensor, eps: float, is_quantized: bool = False) -> torch.Tensor | QuantizedRows:
    """As the reference; quantised from bf16. The last dim is contiguous, and rows lie at equal distances (a column slice of a matrix
    will do)."""
    width = x.shape[-1]
    flat = x if x.dim() == 2 else x.reshape(-1, width)
    assert flat.stride(1) == 1 and weight.is_contiguous(), f"{x.stride()=}"
    assert not is_quantized or (x.dim() == 2 and x.dtype == torch.bfloat16), f"{x.shape} {x.dtype}"
    out = QuantizedRows.empty(len(flat), width, x.dtype, x.device) if is_quantized else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if flat.numel():
        values, scale = (out.codes, out.scale) if isinstance(out, QuantizedRows) else (out, out)
        padded = max(FP8_BLOCK, triton.next_power_of_2(width))
        rows = max(1, min(TILE // padded, triton.next_power_of_2(triton.cdiv(len(flat), 264))))
        rms_norm_kernel[(triton.cdiv(len(flat), rows),)](
            flat, weight, values, scale, len(flat), width, flat.stride(0), values.shape[-1], scale.stride(-1), eps,
            ROWS=rows, PADDED_WIDTH=padded, num_warps=warps(rows * padded),
        )  # fmt: skip
    return out


def warps(elements: int) -> int:
    """16 elements a thread, and at least one warp."""
    return min(8, max(1, elements // 512))


_TYPES = {"weight_ptr": "*bf16", "rows": "i32", "width": "i32:16", "row_stride": "i32:16", "out_width": "i32:16"}
_TYPES |= {"scale_stride": "i32", "eps": "fp32"}
AOT = [
    (
        rms_norm_kernel,
        _TYPES | {"x_ptr": x, "out_ptr": out, "scale_ptr": scale},
        {"ROWS": rows, "PADDED_WIDTH": width},
        {"num_warps": warps(rows * width)},
    )
    for x, out, scale, rows, width in (
        ("*bf16", "*bf16", "*bf16", 4, 1024),
        ("*bf16", "*bf16", "*bf16", 1, 1024),
        ("*bf16", "*bf16", "*bf16", 1, 8192),
        ("*bf16", "*fp8e4nv", "*fp32", 1, 1024),
        ("*bf16", "*fp8e4nv", "*fp32", 4, 1024),
        ("*bf16", "*fp8e4nv", "*fp32", 1, 2048),
        ("*fp32", "*fp32", "*fp32", 16, 256),
    )
]

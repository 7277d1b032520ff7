"""rms_norm: a program normalises a few short rows, or one long one, held in registers between the sum and the scaling."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

TILE = 4096
"""Elements of a program, where a row is shorter."""


@triton.jit(do_not_specialize=["rows"])
def rms_norm_kernel(x_ptr, weight_ptr, out_ptr, rows, width, row_stride, eps, ROWS: tl.constexpr, PADDED_WIDTH: tl.constexpr):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    channel = tl.arange(0, PADDED_WIDTH)
    kept = (row < rows)[:, None] & (channel < width)[None, :]
    x = tl.load(x_ptr + row[:, None] * row_stride + channel[None, :], mask=kept, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + channel, mask=channel < width, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 1) / width + eps)
    out = x * scale[:, None] * weight[None, :]
    tl.store(out_ptr + row[:, None] * width + channel[None, :], out.to(out_ptr.dtype.element_ty), mask=kept)


def run(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """As the reference. The last dim is contiguous, and rows lie at equal distances (a column slice of a matrix will do)."""
    width = x.shape[-1]
    flat = x if x.dim() == 2 else x.reshape(-1, width)
    assert flat.stride(1) == 1 and weight.is_contiguous(), f"{x.stride()=}"
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if flat.numel():
        padded = triton.next_power_of_2(width)
        rows = max(1, min(TILE // padded, triton.next_power_of_2(triton.cdiv(len(flat), 264))))
        grid = (triton.cdiv(len(flat), rows),)
        rms_norm_kernel[grid](
            flat, weight, out, len(flat), width, flat.stride(0), eps, ROWS=rows, PADDED_WIDTH=padded, num_warps=warps(rows * padded)
        )
    return out


def warps(elements: int) -> int:
    """16 elements a thread, and at least one warp."""
    return min(8, max(1, elements // 512))


_TYPES = {"weight_ptr": "*bf16", "rows": "i32", "width": "i32:16", "row_stride": "i32:16", "eps": "fp32"}
AOT = [
    (
        rms_norm_kernel,
        _TYPES | {"x_ptr": dtype, "out_ptr": dtype},
        {"ROWS": rows, "PADDED_WIDTH": width},
        {"num_warps": warps(rows * width)},
    )
    for dtype, rows, width in (("*bf16", 4, 1024), ("*bf16", 1, 1024), ("*bf16", 1, 8192), ("*fp32", 16, 256))
]

"""output_derotate in place: only the rope channels, an eighth of a head, are read and written."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def output_derotate_kernel(o_ptr, cos_ptr, sin_ptr, heads, dim, ROWS: tl.constexpr, ROPE: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    at = (token * heads + head)[:, None] * dim + (dim - ROPE) + tl.arange(0, ROPE)[None, :]
    kept = (head < heads)[:, None]
    pair = token * (ROPE // 2) + tl.arange(0, ROPE // 2)
    c, s = tl.load(cos_ptr + pair)[None, :], tl.load(sin_ptr + pair)[None, :]
    even, odd = tl.split(tl.reshape(tl.load(o_ptr + at, mask=kept, other=0.0).to(tl.float32), [ROWS, ROPE // 2, 2]))
    out = tl.reshape(tl.join(even * c + odd * s, odd * c - even * s), [ROWS, ROPE])
    tl.store(o_ptr + at, out.to(o_ptr.dtype.element_ty), mask=kept)


def run(o: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """As the reference, but returns o itself, changed; all contiguous, the rope width a power of two."""
    tokens, heads, dim = o.shape
    rope = 2 * cos.shape[1]
    assert o.is_contiguous() and cos.is_contiguous() and sin.is_contiguous() and rope & (rope - 1) == 0, f"{o.stride()=} {rope=}"
    if tokens:
        rows = min(64, triton.next_power_of_2(heads))
        output_derotate_kernel[(tokens, triton.cdiv(heads, rows))](o, cos, sin, heads, dim, ROWS=rows, ROPE=rope, num_warps=4)
    return o


AOT = [
    (
        output_derotate_kernel,
        {"o_ptr": dtype, "cos_ptr": "*fp32", "sin_ptr": "*fp32", "heads": "i32", "dim": "i32:16"},
        {"ROWS": rows, "ROPE": rope},
        {"num_warps": 4},
    )
    for dtype, rows, rope in (("*bf16", 64, 64), ("*fp32", 8, 16))
]

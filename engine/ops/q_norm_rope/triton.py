"""q_norm_rope in place, so that half as much has to stay in L2: a program takes a few heads of one token; the pairs before the rope
channels turn by an angle of 0."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

HEADS = 8
"""Heads of a program."""


@triton.jit
def rotate(x, cos_ptr, sin_ptr, token, ROPE: tl.constexpr):
    """x: fp32 [R, D], heads of one token, D a power of two -> its last ROPE channels turned by interleaved pairs."""
    PAIRS: tl.constexpr = x.shape[1] // 2
    pair = tl.arange(0, PAIRS) - (PAIRS - ROPE // 2)
    c = tl.load(cos_ptr + token * (ROPE // 2) + pair, mask=pair >= 0, other=1.0)[None, :]
    s = tl.load(sin_ptr + token * (ROPE // 2) + pair, mask=pair >= 0, other=0.0)[None, :]
    even, odd = tl.split(tl.reshape(x, [x.shape[0], PAIRS, 2]))
    return tl.reshape(tl.join(even * c - odd * s, even * s + odd * c), [x.shape[0], x.shape[1]])


@triton.jit
def q_norm_rope_kernel(q_ptr, cos_ptr, sin_ptr, heads, eps, ROWS: tl.constexpr, DIM: tl.constexpr, ROPE: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    at = (token * heads + head)[:, None] * DIM + tl.arange(0, DIM)[None, :]
    kept = (head < heads)[:, None]
    q = tl.load(q_ptr + at, mask=kept, other=0.0).to(tl.float32)
    q = q * tl.rsqrt(tl.sum(q * q, 1) / DIM + eps)[:, None]
    tl.store(q_ptr + at, rotate(q, cos_ptr, sin_ptr, token, ROPE).to(q_ptr.dtype.element_ty), mask=kept)


def run(q: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, eps: float) -> torch.Tensor:
    """As the reference, but returns q itself, changed; D and the rope width powers of two, all contiguous."""
    tokens, heads, dim = q.shape
    rope = 2 * cos.shape[1]
    assert q.is_contiguous() and cos.is_contiguous() and sin.is_contiguous(), f"{q.stride()=}"
    assert dim & (dim - 1) == 0 and rope & (rope - 1) == 0, f"{dim=} {rope=}"
    if tokens:
        grid = (tokens, triton.cdiv(heads, HEADS))
        q_norm_rope_kernel[grid](q, cos, sin, heads, eps, ROWS=HEADS, DIM=dim, ROPE=rope, num_warps=8 if dim > 256 else 4)
    return q


AOT = [
    (
        q_norm_rope_kernel,
        {"q_ptr": dtype, "cos_ptr": "*fp32", "sin_ptr": "*fp32", "heads": "i32", "eps": "fp32"},
        {"ROWS": HEADS, "DIM": dim, "ROPE": rope},
        {"num_warps": 8 if dim > 256 else 4},
    )
    for dtype, dim, rope in (("*bf16", 512, 64), ("*fp32", 64, 16))
]

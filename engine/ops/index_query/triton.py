"""Index queries in one pass: a program turns, spreads and quantises some heads of a token or a few.

Many heads are spread by a product with Hadamard's matrix on the matrix units; few by seven turns of additions in registers, which wait for
no matrix to be loaded, over as many programs as there are for it.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from engine.cache.rows import RowFormat
from engine.ops.index_query import hadamard
from engine.ops.triton_rounding import round_bf16, to_bf16
from engine.ops.triton_rows import form_name, fp4_values, fp8_index_codes, rotated, rounded, spread, turns

FEW_TOKENS = 64
FEW_ROWS, FEW_WARPS = 2, 1
"""Heads of one program, and its warps, up to so many tokens,"""
ROWS, WARPS = 64, 4
"""and above."""


@functools.cache
def signs(size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Sylvester's matrix with entries 1 and -1. Not to be written to."""
    return (hadamard(size, device) * size**0.5).round().to(dtype)


@triton.jit(do_not_specialize=["num_rows"])
def index_query_kernel(
    q_ptr, weights_ptr, cos_ptr, sin_ptr, signs_ptr, out_ptr, factors_ptr, num_rows, weights_stride, factor,
    ROWS: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, ROPE: tl.constexpr, FORM: tl.constexpr, BF16: tl.constexpr,
    MATRIX: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    channel = tl.arange(0, DIM)
    there = row < num_rows
    at = row[:, None] * DIM + channel[None, :]
    x = tl.load(q_ptr + at, mask=there[:, None], other=0.0).to(tl.float32)
    weights = tl.load(weights_ptr + row // HEADS * weights_stride + row % HEADS, mask=there, other=0.0)
    weights = rounded(weights.to(tl.float32), BF16) * factor
    c, s = turns(cos_ptr, sin_ptr, tl.where(there, row // HEADS, -1), DIM, ROPE)
    x = rotated(x, c, s, ROWS, DIM)
    if FORM == "fp8_index" or FORM == "fp4_index":
        if MATRIX:
            matrix = tl.load(signs_ptr + channel[:, None] * DIM + channel[None, :])
            if BF16:  # products with 1 and -1 are exact
                x = round_bf16(tl.dot(to_bf16(x), matrix) * (DIM**-0.5))
            else:
                x = tl.dot(x, matrix, input_precision="ieee") * (DIM**-0.5)
        else:
            x = rounded(spread(rounded(x, BF16), ROWS, DIM), BF16)
    else:
        x = rounded(x, BF16)
    if FORM == "fp8_index":
        codes, scale = fp8_index_codes(x)
        tl.store(out_ptr + at, codes.to(tl.uint8, bitcast=True), mask=there[:, None])
        weights *= tl.reshape(scale, [ROWS])
    elif FORM == "fp4_index":
        values, exponent = fp4_values(x, ROWS, DIM)
        values = tl.reshape(values * (exponent << 23).to(tl.float32, bitcast=True), [ROWS, DIM])
        tl.store(out_ptr + at, to_bf16(values), mask=there[:, None])
    elif FORM == "bf16":
        tl.store(out_ptr + at, to_bf16(x), mask=there[:, None])
    else:
        tl.store(out_ptr + at, x, mask=there[:, None])
    tl.store(factors_ptr + row, weights, mask=there)


def run(
    q: torch.Tensor, weights: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, scale: float, form: RowFormat
) -> tuple[torch.Tensor, torch.Tensor]:
    """As the reference; 128 channels in the quantised formats. Rows of weights may be further apart than they are long."""
    tokens, heads, dim = q.shape
    assert weights.stride(1) == 1, f"{weights.stride()=}"
    name = form_name(form)
    out = torch.empty(q.shape, dtype=torch.uint8 if name == "fp8_index" else form.dtype, device=q.device)
    factors = torch.empty(tokens, heads, dtype=torch.float32, device=q.device)
    is_few = tokens <= FEW_TOKENS
    matrix = signs(dim, q.dtype, q.device) if name in ("fp8_index", "fp4_index") and not is_few else q
    rows, warps = (FEW_ROWS, FEW_WARPS) if is_few else (ROWS, WARPS)
    if tokens:
        index_query_kernel[(triton.cdiv(tokens * heads, rows),)](
            q.contiguous(), weights, cos, sin, matrix, out, factors, tokens * heads, weights.stride(0), scale,
            ROWS=rows, HEADS=heads, DIM=dim, ROPE=2 * cos.shape[1], FORM=name, BF16=q.dtype == torch.bfloat16, MATRIX=not is_few,
            num_warps=warps,
        )  # fmt: skip
    return out.view(torch.float8_e4m3fn) if name == "fp8_index" else out, factors


_SIGNATURE = dict.fromkeys(("cos_ptr", "sin_ptr", "factors_ptr"), "*fp32") | {"num_rows": "i32", "factor": "fp32"}
_SIGNATURE |= {"q_ptr": "*bf16", "weights_ptr": "*fp32", "signs_ptr": "*bf16", "weights_stride": "i32:16"}
AOT = [
    (
        index_query_kernel,
        _SIGNATURE | {"out_ptr": out},
        {"ROWS": rows, "HEADS": 64, "DIM": 128, "ROPE": 64, "FORM": form, "BF16": True, "MATRIX": matrix},
        {"num_warps": warps},
    )
    for form, out in (("fp8_index", "*u8"), ("fp4_index", "*bf16"), ("bf16", "*bf16"))
    for rows, warps, matrix in ((ROWS, WARPS, True), (FEW_ROWS, FEW_WARPS, False))
]

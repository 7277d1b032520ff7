"""What the kernels of decode attention share: how they read rows of a pool, and turn the result back."""

from __future__ import annotations

import triton
import triton.language as tl

CODES = tl.constexpr(448)
"""Channels of an FP8 row before those in bf16; its scales are of 64 channels each."""


@triton.jit
def listed(rows_ptr, first, count, N: tl.constexpr):
    """Rows [first, first + N) of a list of `count`: int64, -1 unused."""
    place = first + tl.arange(0, N)
    return tl.load(rows_ptr + place, mask=place < count, other=-1).to(tl.int64)


@triton.jit
def channels(
    data_ptr, scale_ptr, stride, rows, first, PER_UNIT: tl.constexpr, WIDTH: tl.constexpr, FP8: tl.constexpr, COLUMNS: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    """DOT [N, COLUMNS]: channels [first, first + COLUMNS) of rows of a pool, zero where unused."""
    used = rows >= 0
    unit, row = tl.maximum(rows, 0) // PER_UNIT, tl.maximum(rows, 0) % PER_UNIT
    column = first + tl.arange(0, COLUMNS)
    if FP8:
        base = data_ptr + unit * stride + row * (2 * WIDTH - CODES)
        if first < CODES:
            codes = tl.load(base[:, None] + column[None, :], mask=used[:, None], other=0)
            exponent = tl.load(scale_ptr + unit * stride + row * 8 + first // 64, mask=used, other=0)
            power = (exponent.to(tl.int32) << 23).to(tl.float32, bitcast=True)
            v = (codes.to(tl.float8e4nv, bitcast=True).to(tl.float32) * power[:, None]).to(DOT)
        else:
            last = (base + CODES).to(tl.pointer_type(tl.bfloat16))
            v = tl.load(last[:, None] + (column - CODES)[None, :], mask=used[:, None], other=0.0).to(tl.float32).to(DOT)
    else:
        base = (data_ptr + unit * stride).to(tl.pointer_type(tl.bfloat16)) + row * WIDTH
        v = tl.load(base[:, None] + column[None, :], mask=used[:, None], other=0.0).to(tl.float32).to(DOT)
    return v


@triton.jit
def turned_back(o, cos_ptr, sin_ptr, first, WIDTH: tl.constexpr, ROPE: tl.constexpr):
    """fp32 [HEADS, COLUMNS]: channels [first, ...) of a result, of which the last ROPE are turned back by a sequence's angles."""
    HEADS: tl.constexpr = o.shape[0]
    COLUMNS: tl.constexpr = o.shape[1]
    if first + COLUMNS > WIDTH - ROPE:
        pair = first // 2 + tl.arange(0, COLUMNS // 2) - (WIDTH - ROPE) // 2
        c = tl.load(cos_ptr + pair, mask=pair >= 0, other=1.0)[None, :]
        s = tl.load(sin_ptr + pair, mask=pair >= 0, other=0.0)[None, :]
        even, odd = tl.split(tl.reshape(o, [HEADS, COLUMNS // 2, 2]))
        o = tl.reshape(tl.join(even * c + odd * s, odd * c - even * s), [HEADS, COLUMNS])
    return o

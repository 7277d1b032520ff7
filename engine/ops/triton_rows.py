"""Vectors on their way into pools, for Triton kernels: norm, rotation, Hadamard spread, and the row formats of engine/cache/rows.py.

x is an fp32 tile [N, DIM]; a bf16 value is an fp32 that bf16 holds. FORM names a row format: "fp8_kv", "fp8_index", "fp4_index", or
"bf16" and "fp32" for plain rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.cache.rows import Fp4IndexRows, Fp8IndexRows, Fp8KvRows, RowFormat
from engine.ops.triton_rounding import AMAX_FLOOR, quantize, round_bf16, to_bf16, to_fp8

FP8_MAX = tl.constexpr(448.0)
FP4_FLOOR = tl.constexpr(6.0 * 2.0**-126)


def form_name(form: RowFormat) -> str:
    names = {Fp8KvRows: "fp8_kv", Fp8IndexRows: "fp8_index", Fp4IndexRows: "fp4_index"}
    return names.get(type(form)) or ("bf16" if form.dtype == torch.bfloat16 else "fp32")


@triton.jit
def rounded(x, BF16: tl.constexpr):
    if BF16:
        x = round_bf16(x)
    return x


@triton.jit
def normed(x, weight, eps, DIM: tl.constexpr):
    """weight: [DIM]."""
    return x * tl.rsqrt(tl.sum(x * x, 1) / DIM + eps)[:, None] * weight.to(tl.float32)[None, :]


@triton.jit
def turns(cos_ptr, sin_ptr, row, DIM: tl.constexpr, ROPE: tl.constexpr):
    """Cosine and sine, [N, DIM / 2] of pairs of channels: 1 and 0 before the last ROPE channels, and for rows < 0. row: [N] of cos and
    sin, fp32 [rows, ROPE / 2]."""
    pair = tl.arange(0, DIM // 2) - (DIM - ROPE) // 2
    turned = (row >= 0)[:, None] & (pair >= 0)[None, :]
    angle = row[:, None] * (ROPE // 2) + pair[None, :]
    return tl.load(cos_ptr + angle, mask=turned, other=1.0), tl.load(sin_ptr + angle, mask=turned, other=0.0)


@triton.jit
def rotated(x, c, s, N: tl.constexpr, DIM: tl.constexpr):
    even, odd = tl.split(tl.reshape(x, [N, DIM // 2, 2]))
    return tl.reshape(tl.join(even * c - odd * s, even * s + odd * c), [N, DIM])


@triton.jit
def spread(x, N: tl.constexpr, DIM: tl.constexpr):
    """Times the normalised Hadamard matrix. Each turn takes the lowest bit of the channel's number and moves it to the top."""
    tl.static_assert(DIM == 128)
    for _ in tl.static_range(7):
        a, b = tl.split(tl.reshape(x, [N, DIM // 2, 2]))
        x = tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 2, 1)), [N, DIM])
    return x * (DIM**-0.5)


@triton.jit
def fp8_index_codes(x):
    """(e4m3 codes [N, DIM], fp32 scales [N, 1]), scale max(amax, 1e-4) / 448."""
    amax = tl.maximum(tl.max(tl.abs(x), 1, keep_dims=True), AMAX_FLOOR)
    scale = tl.div_rn(amax, tl.full(amax.shape, FP8_MAX, tl.float32))
    # A division for each row, and for each value one correction of the product: what a division of its own would give.
    inverse = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
    codes = x * inverse
    codes = tl.fma(tl.fma(-codes, tl.broadcast_to(scale, x.shape), x), tl.broadcast_to(inverse, x.shape), codes)
    return to_fp8(tl.minimum(tl.maximum(codes, -FP8_MAX), FP8_MAX)), scale


@triton.jit
def fp4_values(x, N: tl.constexpr, DIM: tl.constexpr):
    """(e2m1 values fp32 [N, DIM / 32, 32], exponents int32 [N, DIM / 32, 1] of the groups' scales)."""
    groups = tl.reshape(x, [N, DIM // 32, 32])
    amax = tl.maximum(tl.max(tl.abs(groups), 2, keep_dims=True), FP4_FLOOR)
    bits = tl.div_rn(amax, tl.full(amax.shape, 6.0, tl.float32)).to(tl.int32, bitcast=True)
    exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0).to(tl.int32)
    magnitude = tl.minimum(tl.abs(groups) * ((254 - exponent) << 23).to(tl.float32, bitcast=True), 6.0)
    step = tl.where(magnitude < 2.0, 0.5, tl.where(magnitude < 4.0, 1.0, 2.0))
    # Adding 1.5 * 2^23 leaves no bits behind the point: rounds half to even.
    whole = (magnitude / step + 12582912.0) - 12582912.0
    return tl.where(groups < 0, -whole * step, whole * step), exponent


@triton.jit
def fp4_bytes(values, negative, N: tl.constexpr, DIM: tl.constexpr):
    """uint8 [N, DIM / 2]: pairs of 4-bit codes, even channel low. values: of fp4_values; negative: bool of the same shape."""
    magnitude = tl.abs(values)
    code = tl.where(magnitude < 2.0, magnitude * 2.0, tl.where(magnitude < 4.0, magnitude + 2.0, magnitude * 0.5 + 4.0))
    code = code.to(tl.int32) | tl.where(negative, 8, 0)
    low, high = tl.split(tl.reshape(code, [N, DIM // 2, 2]))
    return (low | (high << 4)).to(tl.uint8)


@triton.jit
def store_row(x, data_ptr, scale_ptr, DIM: tl.constexpr, ROPE: tl.constexpr, FORM: tl.constexpr):
    """Encode x [1, DIM] into a row; data_ptr and scale_ptr: uint8 pointers to its bytes."""
    channel = tl.arange(0, DIM)[None, :]
    if FORM == "fp8_kv":
        x = round_bf16(x)
        codes, power = quantize(tl.reshape(x, [1, DIM // 64, 64]), 2)
        nope = channel < DIM - ROPE
        tl.store(data_ptr + channel, tl.reshape(codes, [1, DIM]).to(tl.uint8, bitcast=True), mask=nope)
        tl.store(
            (data_ptr + (DIM - ROPE)).to(tl.pointer_type(tl.bfloat16)) + (channel - (DIM - ROPE)), to_bf16(x), mask=channel >= DIM - ROPE
        )
        group = tl.arange(0, DIM // 64)[None, :]  # the last one is the rope channels: its byte is padding, zero
        exponent = tl.reshape(power.to(tl.int32, bitcast=True) >> 23, [1, DIM // 64])
        tl.store(scale_ptr + group, tl.where(group < (DIM - ROPE) // 64, exponent, 0).to(tl.uint8))
    elif FORM == "fp8_index":
        codes, scale = fp8_index_codes(x)
        tl.store(data_ptr + channel, codes.to(tl.uint8, bitcast=True))
        tl.store(scale_ptr.to(tl.pointer_type(tl.float32)) + tl.zeros([1, 1], tl.int32), scale)
    elif FORM == "fp4_index":
        values, exponent = fp4_values(x, 1, DIM)
        negative = tl.reshape(x, [1, DIM // 32, 32]).to(tl.int32, bitcast=True) < 0
        tl.store(data_ptr + tl.arange(0, DIM // 2)[None, :], fp4_bytes(values, negative, 1, DIM))
        tl.store(scale_ptr + tl.arange(0, DIM // 32)[None, :], tl.reshape(exponent, [1, DIM // 32]).to(tl.uint8))
    elif FORM == "bf16":
        tl.store(data_ptr.to(tl.pointer_type(tl.bfloat16)) + channel, to_bf16(x))
    else:
        tl.store(data_ptr.to(tl.pointer_type(tl.float32)) + channel, x)


@triton.jit
def store_entry(
    entry, weight, c, s, number, unit, data_ptr, scale_ptr, eps, data_stride, scale_stride, per_page,
    DIM: tl.constexpr, ROPE: tl.constexpr, FORM: tl.constexpr, DATA_BYTES: tl.constexpr, SCALE_BYTES: tl.constexpr, BF16: tl.constexpr,
):  # fmt: skip
    """A pooled entry fp32 [1, DIM] -> row `number` mod per_page of page `unit`: rounded, normed, turned, spread if it is a quantised index
    key, encoded. weight: of the norm; c, s: of `turns`."""
    x = rounded(rotated(normed(rounded(entry, BF16), weight, eps, DIM), c, s, 1, DIM), BF16)
    if FORM == "fp8_index" or FORM == "fp4_index":
        x = rounded(spread(x, 1, DIM), BF16)
    place = number % per_page
    data_ptr += unit.to(tl.int64) * data_stride + place * DATA_BYTES
    scale_ptr += unit.to(tl.int64) * scale_stride + place * SCALE_BYTES
    store_row(x, data_ptr, scale_ptr, DIM, ROPE, FORM)

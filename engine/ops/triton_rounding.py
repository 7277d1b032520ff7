"""Roundings shared by Triton kernels: one instruction compiled, and correct when interpreted.

Triton's interpreter truncates float32 to bfloat16 and loses the carry and the subnormals of float32 to FP8, without a word (seen in
3.6 and 3.7). There the value is brought onto the target's grid first, so that the cast has nothing to round.
"""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
AMAX_FLOOR = tl.constexpr(1e-4)


@triton.jit
def _keep_bits(x, DROPPED: tl.constexpr):
    """fp32 rounded half to even to 23 - DROPPED mantissa bits."""
    bits = x.to(tl.int32, bitcast=True)
    bits += ((1 << (DROPPED - 1)) - 1) + ((bits >> DROPPED) & 1)
    return (bits >> DROPPED << DROPPED).to(tl.float32, bitcast=True)


@triton.jit
def to_bf16(x):
    """Finite fp32 -> bf16, half to even."""
    if INTERPRETED:
        x = _keep_bits(x, 16)
    return x.to(tl.bfloat16)


@triton.jit
def round_bf16(x):
    """Finite fp32 -> the nearest bf16 value, as fp32."""
    if INTERPRETED:
        x = _keep_bits(x, 16)
    else:
        x = x.to(tl.bfloat16).to(tl.float32)
    return x


@triton.jit
def to_fp8(x):
    """fp32 within +-448 -> e4m3, half to even."""
    if INTERPRETED:
        magic = 1.5 * 2.0**14  # an fp32 this large has steps of 2^-9, e4m3's subnormal step
        x = tl.where(tl.abs(x) < 2.0**-6, (x + magic) - magic, _keep_bits(x, 20))
        bits = (tl.abs(x) * 2.0**9).to(tl.int32)
        normal = (tl.abs(x).to(tl.int32, bitcast=True) >> 20) - (120 << 3)
        code = tl.where(tl.abs(x) < 2.0**-6, bits, normal) | tl.where(x < 0, 128, 0)
        out = code.to(tl.uint8).to(tl.float8e4nv, bitcast=True)
    else:
        out = x.to(tl.float8e4nv)
    return out


@triton.jit
def quantize(x, AXIS: tl.constexpr):
    """fp32 -> (e4m3 codes, fp32 scale with AXIS of size 1): scale 2^ceil(log2(max(amax over AXIS, 1e-4) / 448)), from amax's bits:
    448 is 1.75 * 2^8, so the mantissa only has to be compared with 1.75. The reference's rounded quotient gives the same: a quotient
    just above a power of two never rounds down to it. The scale is at least amax / 448, so nothing saturates."""
    bits = tl.maximum(tl.max(tl.abs(x), AXIS, keep_dims=True), AMAX_FLOOR).to(tl.int32, bitcast=True)
    exponent = (bits >> 23) - 8 + ((bits & 0x7FFFFF) > 0x600000).to(tl.int32)
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    return to_fp8(x * inverse), (exponent << 23).to(tl.float32, bitcast=True)

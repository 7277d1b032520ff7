"""kv_store in one pass: a program norms, rotates, rounds, quantises and stores a few tokens, and returns their values as stored."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.cache.arena import RowPool
from engine.cache.rows import Fp8KvRows, PlainRows


@triton.jit
def ceil_exponent(scale):
    """uint8 exponent (bias 127) of the smallest power of two >= scale: int32, from fp32 > 0."""
    bits = scale.to(tl.int32, bitcast=True)
    return (bits >> 23) + tl.where((bits & 0x7FFFFF) != 0, 1, 0)


@triton.jit(do_not_specialize=["tokens"])
def kv_store_kernel(
    kv_ptr, weight_ptr, cos_ptr, sin_ptr, data_ptr, scale_ptr, units_ptr, rows_ptr, out_ptr, tokens, eps,
    kv_stride, unit_stride, row_stride, scale_unit_stride, scale_row_stride,
    TOKENS: tl.constexpr, DIM: tl.constexpr, ROPE: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    GROUPS: tl.constexpr = DIM // 64  # the last group of an FP8 row is the rope channels
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    alive = token < tokens
    unit = tl.load(units_ptr + token, mask=alive, other=-1)
    row = tl.load(rows_ptr + token, mask=alive, other=0)
    stored = (unit >= 0)[:, None, None]
    group = tl.arange(0, GROUPS)[None, :, None]
    channel = group * 64 + tl.arange(0, 64)[None, None, :]
    at = token[:, None, None] * DIM + channel
    x = tl.load(kv_ptr + token[:, None, None] * kv_stride + channel, mask=alive[:, None, None], other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(tl.sum(x * x, 2), 1) / DIM + eps)
    x = x * scale[:, None, None] * tl.load(weight_ptr + channel).to(tl.float32)
    pair = group * 32 + tl.arange(0, 32)[None, None, :] - (DIM - ROPE) // 2
    turned = alive[:, None, None] & (pair >= 0)
    c = tl.load(cos_ptr + token[:, None, None] * (ROPE // 2) + pair, mask=turned, other=1.0)
    s = tl.load(sin_ptr + token[:, None, None] * (ROPE // 2) + pair, mask=turned, other=0.0)
    even, odd = tl.split(tl.reshape(x, [TOKENS, GROUPS, 32, 2]))
    x = tl.reshape(tl.join(even * c - odd * s, even * s + odd * c), [TOKENS, GROUPS, 64]).to(kv_ptr.dtype.element_ty)
    base = data_ptr + (unit * unit_stride + row * row_stride)[:, None, None]
    if FP8:
        x = x.to(tl.bfloat16).to(tl.float32)
        exponent = ceil_exponent(tl.math.div_rn(tl.maximum(tl.max(tl.abs(x), 2), 1e-4), 448.0))
        inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
        power = (exponent << 23).to(tl.float32, bitcast=True)
        codes = tl.clamp(x * inverse[:, :, None], -448.0, 448.0).to(tl.float8e4nv)
        nope = channel < DIM - ROPE
        tl.store(base + channel, codes.to(tl.uint8, bitcast=True), mask=stored & nope)
        rope_base = (base + (DIM - ROPE)).to(tl.pointer_type(tl.bfloat16))
        tl.store(rope_base + (channel - (DIM - ROPE)), x.to(tl.bfloat16), mask=stored & (channel >= DIM - ROPE))
        place = tl.arange(0, GROUPS)[None, :]
        scale_base = scale_ptr + (unit * scale_unit_stride + row * scale_row_stride)[:, None]
        tl.store(scale_base + place, tl.where(place < GROUPS - 1, exponent, 0).to(tl.uint8), mask=(unit >= 0)[:, None] & (place >= 0))
        x = tl.where(nope, codes.to(tl.float32) * power[:, :, None], x)
    else:
        typed = base.to(tl.pointer_type(out_ptr.dtype.element_ty))
        tl.store(typed + channel, x.to(out_ptr.dtype.element_ty), mask=stored & (channel >= 0))
    tl.store(out_ptr + at, x.to(out_ptr.dtype.element_ty), mask=alive[:, None, None])


def run(
    kv: torch.Tensor,
    weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
    pool: RowPool,
    units: torch.Tensor,
    rows: torch.Tensor,
) -> torch.Tensor:
    """As the reference; D a power of two and a multiple of 64, the rope width a power of two. kv may be columns of a wider matrix, other
    tensors are contiguous."""
    tokens, dim = kv.shape
    rope = 2 * cos.shape[1]
    assert all(tensor.is_contiguous() for tensor in (weight, cos, sin, units, rows)) and kv.stride(1) == pool.data.stride(2) == 1
    assert isinstance(pool.form, Fp8KvRows | PlainRows), pool.form
    assert dim & (dim - 1) == 0 and dim % 64 == 0 and rope & (rope - 1) == 0, f"{dim=} {rope=}"
    out = torch.empty(tokens, dim, dtype=pool.form.dtype, device=kv.device)
    if tokens:
        block = 1 if tokens <= 1024 else 4
        kv_store_kernel[(triton.cdiv(tokens, block),)](
            kv, weight, cos, sin, pool.data, pool.scale, units, rows, out, tokens, eps,
            kv.stride(0), *pool.data.stride()[:2], *pool.scale.stride()[:2],
            TOKENS=block, DIM=dim, ROPE=rope, FP8=isinstance(pool.form, Fp8KvRows), num_warps=block,
        )  # fmt: skip
    return out


_TYPES = dict.fromkeys(("data_ptr", "scale_ptr"), "*u8") | dict.fromkeys(("units_ptr", "rows_ptr"), "*i64")
_TYPES |= dict.fromkeys(("cos_ptr", "sin_ptr"), "*fp32") | {"tokens": "i32", "eps": "fp32", "weight_ptr": "*bf16"}
_TYPES |= dict.fromkeys(("kv_stride", "unit_stride", "row_stride"), "i32:16") | dict.fromkeys(
    ("scale_unit_stride", "scale_row_stride"), "i32"
)
AOT = [
    (
        kv_store_kernel,
        _TYPES | {"kv_ptr": dtype, "out_ptr": dtype},
        {"TOKENS": block, "DIM": dim, "ROPE": rope, "FP8": fp8},
        {"num_warps": block},
    )
    for dtype, block, dim, rope, fp8 in (
        ("*bf16", 1, 512, 64, True),
        ("*bf16", 4, 512, 64, True),
        ("*bf16", 4, 512, 64, False),
        ("*fp32", 1, 64, 16, False),
    )
]

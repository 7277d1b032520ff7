"""pool_rows in one launch, a program a few rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.cache.arena import RowPool
from engine.cache.rows import Fp8KvRows, PlainRows

ROWS = 4


@triton.jit(do_not_specialize=["count"])
def pool_rows_kernel(
    data_ptr, scale_ptr, units_ptr, rows_ptr, out_ptr, count, unit_stride, row_stride, scale_unit_stride, scale_row_stride,
    ROWS: tl.constexpr, DIM: tl.constexpr, ROPE: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """FP8: DIM - ROPE codes with a scale for 64 of them, then ROPE channels in bf16. Else DIM channels as out has them."""
    number = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    there = number < count
    unit, row = tl.load(units_ptr + number, mask=there, other=0), tl.load(rows_ptr + number, mask=there, other=0)
    channel = tl.arange(0, DIM)[None, :]
    base = data_ptr + (unit * unit_stride + row * row_stride)[:, None]
    if FP8:
        coded = there[:, None] & (channel < DIM - ROPE)
        codes = tl.load(base + channel, mask=coded, other=0).to(tl.float8e4nv, bitcast=True).to(tl.float32)
        scale = tl.load(scale_ptr + (unit * scale_unit_stride + row * scale_row_stride)[:, None] + channel // 64, mask=coded, other=0)
        coded_values = codes * (scale.to(tl.int32) << 23).to(tl.float32, bitcast=True)
        plain = there[:, None] & (channel >= DIM - ROPE)
        rope = (base + (DIM - ROPE)).to(tl.pointer_type(tl.bfloat16)) + (channel - (DIM - ROPE))
        values = tl.where(coded, coded_values, tl.load(rope, mask=plain, other=0.0).to(tl.float32)).to(tl.bfloat16)
    else:
        values = tl.load(base.to(tl.pointer_type(out_ptr.dtype.element_ty)) + channel, mask=there[:, None])
    tl.store(out_ptr + number[:, None] * DIM + channel, values, mask=there[:, None])


def run(pool: RowPool, units: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """As the reference, of rows of keys and values; units and rows contiguous, D a power of two."""
    form = pool.form
    assert isinstance(form, Fp8KvRows | PlainRows) and units.is_contiguous() and rows.is_contiguous(), f"{form} {units.stride()}"
    assert form.width & (form.width - 1) == 0 and pool.data.stride(2) == 1, f"{form.width} channels, strides {pool.data.stride()}"
    is_fp8 = isinstance(form, Fp8KvRows)
    out = torch.empty(len(units), form.width, dtype=form.dtype, device=units.device)
    if len(units):
        pool_rows_kernel[(triton.cdiv(len(units), ROWS),)](
            pool.data, pool.scale, units, rows, out, len(units), *pool.data.stride()[:2], *pool.scale.stride()[:2],
            ROWS=ROWS, DIM=form.width, ROPE=form.data_bytes - form.width if is_fp8 else 0, FP8=is_fp8, num_warps=4,
        )  # fmt: skip
    return out


_TYPES = dict.fromkeys(("data_ptr", "scale_ptr"), "*u8") | dict.fromkeys(("units_ptr", "rows_ptr"), "*i64") | {"count": "i32"}
_TYPES |= dict.fromkeys(("unit_stride", "row_stride"), "i32:16") | dict.fromkeys(("scale_unit_stride", "scale_row_stride"), "i32")
AOT = [
    (pool_rows_kernel, _TYPES | {"out_ptr": dtype}, {"ROWS": ROWS, "DIM": 512, "ROPE": rope, "FP8": fp8}, {"num_warps": 4})
    for dtype, rope, fp8 in (("*bf16", 64, True), ("*bf16", 0, False), ("*fp32", 0, False))
]

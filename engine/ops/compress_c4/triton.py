"""Ratio-4 compression, a program a token: one that closes a block pools its 8 rows, norms, turns, quantises and stores the entry.

Rows before the chunk come from the ring, which the chunk's last 8 tokens overwrite: prefill closes in a first launch and keeps in a
second. In decode a token reads none of the ring's rows that another writes, and one launch does both.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.batch import TokenPlaces
from engine.cache.arena import RowPool
from engine.ops.triton_rows import form_name, store_entry, turns


@triton.jit(do_not_specialize=["num_tokens", "table_stride"])
def compress_c4_kernel(
    projected_ptr, ape_ptr, ring_ptr, positions_ptr, sequences_ptr, starts_ptr, slots_ptr, table_ptr, weight_ptr, cos_ptr, sin_ptr,
    data_ptr, scale_ptr, num_tokens, eps, row_stride, ring_stride, table_stride, data_stride, scale_stride, per_page,
    DIM: tl.constexpr, ROPE: tl.constexpr, FORM: tl.constexpr, DATA_BYTES: tl.constexpr, SCALE_BYTES: tl.constexpr, BF16: tl.constexpr,
    CLOSE: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    position = tl.load(positions_ptr + token)
    channel = tl.arange(0, DIM)
    ring_ptr += tl.load(slots_ptr + token) * ring_stride
    if CLOSE and (position >= 0) & (position % 4 == 3):
        # All loads come before the first reduction, whose barrier none of them would pass.
        back = tl.arange(0, 8)  # rows of the block before, series A; then of this one, series B
        series = back // 4
        from_batch = (position - 7 + back >= tl.load(starts_ptr + token))[:, None]
        at = (token - 7 + back)[:, None] * row_stride + series[:, None] * DIM + channel[None, :]
        kept = ((position - 7 + back) & 7)[:, None] * (4 * DIM) + series[:, None] * DIM + channel[None, :]
        ape = tl.load(ape_ptr + (back % 4)[:, None] * (2 * DIM) + series[:, None] * DIM + channel[None, :])
        value = tl.load(projected_ptr + at, mask=from_batch, other=0.0)
        score = tl.load(projected_ptr + at + 2 * DIM, mask=from_batch, other=0.0) + ape
        value = tl.where(from_batch, value, tl.load(ring_ptr + kept, mask=from_batch == 0, other=0.0))
        score = tl.where(from_batch, score, tl.load(ring_ptr + kept + 2 * DIM, mask=from_batch == 0, other=0.0))
        number = position // 4
        unit = tl.load(table_ptr + tl.load(sequences_ptr + token) * table_stride + number // per_page)
        weight = tl.load(weight_ptr + channel)
        c, s = turns(cos_ptr, sin_ptr, token + tl.zeros([1], tl.int64), DIM, ROPE)
        share = tl.exp(score - tl.max(score, 0)[None, :])
        entry = tl.sum(share * value, 0) / tl.sum(share, 0)
        store_entry(
            entry[None, :], weight, c, s, number, unit, data_ptr, scale_ptr, eps, data_stride, scale_stride, per_page,
            DIM, ROPE, FORM, DATA_BYTES, SCALE_BYTES, BF16,
        )  # fmt: skip
    if KEEP:
        later = tl.load(sequences_ptr + token + 8, mask=token + 8 < num_tokens, other=-1)
        if (position >= 0) & (later != tl.load(sequences_ptr + token)):
            kind = tl.arange(0, 4)  # kv A, kv B, score A, score B
            at = kind[:, None] * DIM + channel[None, :]
            ape_at = (position % 4) * (2 * DIM) + (kind - 2)[:, None] * DIM + channel[None, :]
            row = tl.load(projected_ptr + token * row_stride + at) + tl.load(ape_ptr + ape_at, mask=(kind >= 2)[:, None], other=0.0)
            tl.store(ring_ptr + (position & 7) * (4 * DIM) + at, row)


def run(
    projected: torch.Tensor,
    ape: torch.Tensor,
    ring: torch.Tensor,
    places: TokenPlaces,
    norm_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
    dtype: torch.dtype,
    is_index: bool,
    pool: RowPool,
) -> None:
    """As the reference; D a power of two, 128 for quantised index keys; `projected` may be columns of a wider matrix."""
    tokens, dim = len(projected), ring.shape[-1]
    form = form_name(pool.form)
    assert is_index or form not in ("fp8_index", "fp4_index"), f"{form} for entries"
    assert projected.stride(1) == 1 and ape.is_contiguous() and ring[0].is_contiguous() and projected.shape[1] == 4 * dim
    for close, keep in ((True, True),) if places.is_decode else ((True, False), (False, True)):
        if tokens:
            compress_c4_kernel[(tokens,)](
                projected, ape, ring, places.positions_T, places.sequences_T, places.starts_T, places.slots_T, places.page_table_SP,
                norm_weight, cos, sin, pool.data, pool.scale, tokens, eps,
                projected.stride(0), ring.stride(0), places.page_table_SP.stride(0),
                pool.data.stride(0), pool.scale.stride(0), pool.data.shape[1],
                DIM=dim, ROPE=2 * cos.shape[1], FORM=form, DATA_BYTES=pool.form.data_bytes, SCALE_BYTES=pool.form.scale_bytes,
                BF16=dtype == torch.bfloat16, CLOSE=close, KEEP=keep, num_warps=max(1, dim // 128),
            )  # fmt: skip


SIGNATURE = dict.fromkeys(("projected_ptr", "ape_ptr", "cos_ptr", "sin_ptr"), "*fp32")
SIGNATURE |= dict.fromkeys(("positions_ptr", "sequences_ptr", "starts_ptr", "slots_ptr"), "*i64") | {"table_ptr": "*i32"}
SIGNATURE |= {"weight_ptr": "*bf16", "data_ptr": "*u8", "scale_ptr": "*u8", "num_tokens": "i32", "eps": "fp32", "table_stride": "i32"}
SIGNATURE |= {"row_stride": "i32:16", "data_stride": "i32:16", "scale_stride": "i32:16", "per_page": "i32"}
"""What the kernel shares with that of ratio 128."""

AOT = [
    (
        compress_c4_kernel,
        SIGNATURE | {"ring_ptr": "*fp32", "ring_stride": "i32:16"},
        dict(zip(("DIM", "ROPE", "FORM", "DATA_BYTES", "SCALE_BYTES", "BF16", "CLOSE", "KEEP"), values, strict=True)),
        {"num_warps": values[0] // 128},
    )
    for values in (
        (512, 64, "fp8_kv", 576, 8, True, True, True),
        (512, 64, "fp8_kv", 576, 8, True, True, False),
        (512, 64, "fp8_kv", 576, 8, True, False, True),
        (512, 64, "bf16", 1024, 0, True, True, False),
        (128, 64, "fp8_index", 128, 4, True, True, True),
        (128, 64, "fp4_index", 64, 4, True, True, False),
    )
]

"""Ratio-128 compression, a program a run of tokens within one block, token by token as the reference: a chunk cut anywhere goes through
the same values. The program of a run's first token does the work, the others end at once.

A chunk's first run starts from the slot's state, which its last one overwrites: prefill closes blocks in a first launch, and a second
one repeats each chunk's last run to keep its state. In decode one launch does both.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.batch import TokenPlaces
from engine.cache.arena import RowPool
from engine.ops.compress_c4.triton import SIGNATURE
from engine.ops.triton_rows import form_name, store_entry

NEUTRAL = tl.constexpr(torch.finfo(torch.float32).min)


@triton.jit(do_not_specialize=["num_tokens", "table_stride"])
def compress_c128_kernel(
    projected_ptr, ape_ptr, state_ptr, positions_ptr, sequences_ptr, starts_ptr, slots_ptr, table_ptr, weight_ptr, cos_ptr, sin_ptr,
    data_ptr, scale_ptr, num_tokens, eps, state_stride, table_stride, data_stride, scale_stride, per_page,
    DIM: tl.constexpr, ROPE: tl.constexpr, FORM: tl.constexpr, DATA_BYTES: tl.constexpr, SCALE_BYTES: tl.constexpr, BF16: tl.constexpr,
    CLOSE: tl.constexpr, KEEP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    position = tl.load(positions_ptr + token)
    place = position % 128
    if (position >= 0) & ((place == 0) | (position == tl.load(starts_ptr + token))):
        sequence = tl.load(sequences_ptr + token)
        ahead = tl.arange(0, 128)
        near = tl.load(sequences_ptr + token + ahead, mask=token + ahead < num_tokens, other=-1)
        count = tl.minimum(tl.sum((near == sequence).to(tl.int32), 0), (128 - place).to(tl.int32))
        is_last = tl.load(sequences_ptr + token + count, mask=token + count < num_tokens, other=-1) != sequence
        closes = place + count == 128
        if (CLOSE and closes) | (KEEP and is_last):
            channel = tl.arange(0, DIM)
            state_ptr += tl.load(slots_ptr + token) * state_stride
            top = tl.load(state_ptr + channel, mask=(place > 0) & (channel < DIM), other=NEUTRAL)
            total = tl.load(state_ptr + DIM + channel, mask=(place > 0) & (channel < DIM), other=0.0)
            weighted = tl.load(state_ptr + 2 * DIM + channel, mask=(place > 0) & (channel < DIM), other=0.0)
            for step in tl.range(0, count, num_stages=STAGES):
                row = projected_ptr + (token + step) * (2 * DIM) + channel
                value = tl.load(row)
                score = tl.load(row + DIM) + tl.load(ape_ptr + (place + step) * DIM + channel)
                higher = tl.maximum(top, score)
                keep = tl.exp(top - higher)
                add = tl.exp(score - higher)
                total = total * keep + add
                weighted = weighted * keep + add * value
                top = higher
            if KEEP and is_last:
                tl.store(state_ptr + channel, top)
                tl.store(state_ptr + DIM + channel, total)
                tl.store(state_ptr + 2 * DIM + channel, weighted)
            if CLOSE and closes:
                number = position // 128
                unit = tl.load(table_ptr + sequence * table_stride + number // per_page)
                store_entry(
                    (weighted / total)[None, :], token + count - 1, number, unit, weight_ptr, cos_ptr, sin_ptr, data_ptr, scale_ptr, eps,
                    data_stride, scale_stride, per_page, DIM, ROPE, FORM, DATA_BYTES, SCALE_BYTES, BF16,
                )  # fmt: skip


def run(
    projected: torch.Tensor,
    ape: torch.Tensor,
    state: torch.Tensor,
    places: TokenPlaces,
    norm_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
    dtype: torch.dtype,
    pool: RowPool,
) -> None:
    """As the reference, in fp32; D a power of two."""
    tokens, dim = len(projected), state.shape[-1]
    assert projected.is_contiguous() and ape.is_contiguous() and state[0].is_contiguous() and projected.shape[1] == 2 * dim
    for close, keep in ((True, True),) if places.is_decode else ((True, False), (False, True)):
        if tokens:
            compress_c128_kernel[(tokens,)](
                projected, ape, state, places.positions_T, places.sequences_T, places.starts_T, places.slots_T, places.page_table_SP,
                norm_weight, cos, sin, pool.data, pool.scale, tokens, eps,
                state.stride(0), places.page_table_SP.stride(0), pool.data.stride(0), pool.scale.stride(0), pool.data.shape[1],
                DIM=dim, ROPE=2 * cos.shape[1], FORM=form_name(pool.form),
                DATA_BYTES=pool.form.data_bytes, SCALE_BYTES=pool.form.scale_bytes, BF16=dtype == torch.bfloat16,
                CLOSE=close, KEEP=keep, STAGES=1 if places.is_decode else 8, num_warps=max(1, dim // 128),
            )  # fmt: skip


AOT = [
    (
        compress_c128_kernel,
        SIGNATURE | {"state_ptr": "*fp32", "state_stride": "i32:16"},
        dict(zip(("DIM", "ROPE", "FORM", "DATA_BYTES", "SCALE_BYTES", "BF16", "CLOSE", "KEEP", "STAGES"), values, strict=True)),
        {"num_warps": 4},
    )
    for values in (
        (512, 64, "fp8_kv", 576, 8, True, True, True, 1),
        (512, 64, "fp8_kv", 576, 8, True, True, False, 8),
        (512, 64, "fp8_kv", 576, 8, True, False, True, 8),
    )
]

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
from engine.ops.triton_rows import form_name, store_entry, turns

BATCH = 8
"""Tokens that a prefill program has in registers, and as many on their way."""
NEUTRAL = tl.constexpr(torch.finfo(torch.float32).min)


@triton.jit(do_not_specialize=["num_tokens", "table_stride"])
def compress_c128_kernel(
    projected_ptr, ape_ptr, state_ptr, positions_ptr, sequences_ptr, starts_ptr, slots_ptr, table_ptr, weight_ptr, cos_ptr, sin_ptr,
    data_ptr, scale_ptr, num_tokens, eps, state_stride, table_stride, data_stride, scale_stride, per_page,
    DIM: tl.constexpr, ROPE: tl.constexpr, FORM: tl.constexpr, DATA_BYTES: tl.constexpr, SCALE_BYTES: tl.constexpr, BF16: tl.constexpr,
    CLOSE: tl.constexpr, KEEP: tl.constexpr, BATCH: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    position = tl.load(positions_ptr + token)
    place = position % 128
    if (position >= 0) & ((place == 0) | (position == tl.load(starts_ptr + token))):
        sequence = tl.load(sequences_ptr + token)
        rest = token + tl.arange(0, 128)
        near = tl.load(sequences_ptr + rest, mask=rest < num_tokens, other=-1)
        count = tl.minimum(tl.sum((near == sequence).to(tl.int32), 0), (128 - place).to(tl.int32))
        is_last = tl.load(sequences_ptr + token + count, mask=token + count < num_tokens, other=-1) != sequence
        closes = place + count == 128
        if (CLOSE and closes) | (KEEP and is_last):
            channel = tl.arange(0, DIM)
            state_ptr += tl.load(slots_ptr + token) * state_stride
            top = tl.load(state_ptr + channel, mask=(place > 0) & (channel < DIM), other=NEUTRAL)
            total = tl.load(state_ptr + DIM + channel, mask=(place > 0) & (channel < DIM), other=0.0)
            weighted = tl.load(state_ptr + 2 * DIM + channel, mask=(place > 0) & (channel < DIM), other=0.0)
            # BATCH tokens at a time, the next ones on their way; within a thread a batch's rows are registers.
            ahead = tl.arange(0, BATCH)
            there = (ahead < count)[:, None]
            at = (token + ahead)[:, None] * (2 * DIM) + channel[None, :]
            value = tl.load(projected_ptr + at, mask=there, other=0.0)
            score = tl.load(projected_ptr + at + DIM, mask=there, other=0.0)
            score += tl.load(ape_ptr + (place + ahead)[:, None] * DIM + channel[None, :], mask=there, other=0.0)
            for first in range(0, count, BATCH):
                there = (first + BATCH + ahead < count)[:, None]
                at = (token + first + BATCH + ahead)[:, None] * (2 * DIM) + channel[None, :]
                next_value = tl.load(projected_ptr + at, mask=there, other=0.0)
                next_score = tl.load(projected_ptr + at + DIM, mask=there, other=0.0)
                next_ape = tl.load(ape_ptr + (place + first + BATCH + ahead)[:, None] * DIM + channel[None, :], mask=there, other=0.0)
                for step in tl.static_range(BATCH):
                    new = tl.sum(tl.where((ahead == step)[:, None], score, 0.0), 0)
                    higher = tl.maximum(top, new)
                    keep = tl.exp(top - higher)
                    add = tl.exp(new - higher)
                    gain = add * tl.sum(tl.where((ahead == step)[:, None], value, 0.0), 0)
                    active = first + step < count
                    total = tl.where(active, total * keep + add, total)
                    weighted = tl.where(active, weighted * keep + gain, weighted)
                    top = tl.where(active, higher, top)
                value = next_value
                score = next_score + next_ape
            if KEEP and is_last:
                tl.store(state_ptr + channel, top)
                tl.store(state_ptr + DIM + channel, total)
                tl.store(state_ptr + 2 * DIM + channel, weighted)
            if CLOSE and closes:
                number = position // 128
                unit = tl.load(table_ptr + sequence * table_stride + number // per_page)
                weight = tl.load(weight_ptr + channel)
                c, s = turns(cos_ptr, sin_ptr, token + count - 1 + tl.zeros([1], tl.int64), DIM, ROPE)
                store_entry(
                    (weighted / total)[None, :], weight, c, s, number, unit, data_ptr, scale_ptr, eps,
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
                CLOSE=close, KEEP=keep, BATCH=1 if places.is_decode else BATCH, num_warps=max(1, dim // 128),
            )  # fmt: skip


AOT = [
    (
        compress_c128_kernel,
        SIGNATURE | {"state_ptr": "*fp32", "state_stride": "i32:16"},
        dict(zip(("DIM", "ROPE", "FORM", "DATA_BYTES", "SCALE_BYTES", "BF16", "CLOSE", "KEEP", "BATCH"), values, strict=True)),
        {"num_warps": 4},
    )
    for values in (
        (512, 64, "fp8_kv", 576, 8, True, True, True, 1),
        (512, 64, "fp8_kv", 576, 8, True, True, False, BATCH),
        (512, 64, "fp8_kv", 576, 8, True, False, True, BATCH),
    )
]

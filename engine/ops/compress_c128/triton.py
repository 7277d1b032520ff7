"""Ratio-128 compression, a program a run of tokens within one block, token by token as the reference: a chunk cut anywhere goes through
the same values. The program of a run's first token does the work, the others end at once.

A chunk's first run starts from the slot's state, which its last one would overwrite: in prefill the last runs leave their states aside,
and a second launch moves them into the slots.
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
    projected_ptr, ape_ptr, state_ptr, kept_ptr, positions_ptr, sequences_ptr, starts_ptr, slots_ptr, table_ptr, weight_ptr, cos_ptr,
    sin_ptr, data_ptr, scale_ptr, num_tokens, eps, row_stride, state_stride, table_stride, data_stride, scale_stride, per_page,
    DIM: tl.constexpr, ROPE: tl.constexpr, FORM: tl.constexpr, DATA_BYTES: tl.constexpr, SCALE_BYTES: tl.constexpr, BF16: tl.constexpr,
    BATCH: tl.constexpr,
):  # fmt: skip
    """kept_ptr: states after the chunks' last runs: the slots' own where BATCH is 1, else [sequences, 3, DIM]."""
    token = tl.program_id(0).to(tl.int64)
    position = tl.load(positions_ptr + token)
    place = position % 128
    if (position >= 0) & ((place == 0) | (position == tl.load(starts_ptr + token))):
        sequence = tl.load(sequences_ptr + token)
        rest = token + tl.arange(0, 128)
        near = tl.load(sequences_ptr + rest, mask=rest < num_tokens, other=-1)
        count = tl.minimum(tl.sum((near == sequence).to(tl.int32), 0), (128 - place).to(tl.int32))
        is_last = tl.load(sequences_ptr + token + count, mask=token + count < num_tokens, other=-1) != sequence
        channel = tl.arange(0, DIM)
        slot = tl.load(slots_ptr + token)
        before = state_ptr + slot * state_stride + channel
        top = tl.load(before, mask=(place > 0) & (channel < DIM), other=NEUTRAL)
        total = tl.load(before + DIM, mask=(place > 0) & (channel < DIM), other=0.0)
        weighted = tl.load(before + 2 * DIM, mask=(place > 0) & (channel < DIM), other=0.0)
        # BATCH tokens at a time, the next ones on their way; within a thread a batch's rows are registers. A row past the run is neutral.
        ahead = tl.arange(0, BATCH)
        there = (ahead < count)[:, None]
        at = (token + ahead)[:, None] * row_stride + channel[None, :]
        value = tl.load(projected_ptr + at, mask=there, other=0.0)
        score = tl.load(projected_ptr + at + DIM, mask=there, other=NEUTRAL)
        score += tl.load(ape_ptr + (place + ahead)[:, None] * DIM + channel[None, :], mask=there, other=0.0)
        for first in range(0, count, BATCH):
            there = (first + BATCH + ahead < count)[:, None]
            at = (token + first + BATCH + ahead)[:, None] * row_stride + channel[None, :]
            next_value = tl.load(projected_ptr + at, mask=there, other=0.0)
            next_score = tl.load(projected_ptr + at + DIM, mask=there, other=NEUTRAL)
            next_ape = tl.load(ape_ptr + (place + first + BATCH + ahead)[:, None] * DIM + channel[None, :], mask=there, other=0.0)
            for step in tl.static_range(BATCH):
                new = tl.sum(tl.where((ahead == step)[:, None], score, 0.0), 0)
                # One of the two factors is 1, and the other this.
                lower = tl.exp(-tl.abs(new - top))
                keep = tl.where(new > top, lower, 1.0)
                add = tl.where(new > top, 1.0, lower)
                total = tl.fma(total, keep, add)
                weighted = tl.fma(weighted, keep, add * tl.sum(tl.where((ahead == step)[:, None], value, 0.0), 0))
                top = tl.maximum(top, new)
            value = next_value
            score = next_score + next_ape
        if is_last:
            if BATCH == 1:
                kept_ptr += slot * state_stride
            else:
                kept_ptr += sequence * (3 * DIM)
            tl.store(kept_ptr + channel, top)
            tl.store(kept_ptr + DIM + channel, total)
            tl.store(kept_ptr + 2 * DIM + channel, weighted)
        if place + count == 128:
            number = position // 128
            unit = tl.load(table_ptr + sequence * table_stride + number // per_page)
            weight = tl.load(weight_ptr + channel)
            c, s = turns(cos_ptr, sin_ptr, token + count - 1 + tl.zeros([1], tl.int64), DIM, ROPE)
            store_entry(
                (weighted / total)[None, :], weight, c, s, number, unit, data_ptr, scale_ptr, eps, data_stride, scale_stride, per_page,
                DIM, ROPE, FORM, DATA_BYTES, SCALE_BYTES, BF16,
            )  # fmt: skip


@triton.jit(do_not_specialize=["num_tokens"])
def move_states_kernel(
    kept_ptr, state_ptr, positions_ptr, sequences_ptr, slots_ptr, num_tokens, state_stride, NUM: tl.constexpr, PADDED: tl.constexpr
):
    """The program of a chunk's last token moves the chunk's state of NUM numbers."""
    token = tl.program_id(0).to(tl.int64)
    sequence = tl.load(sequences_ptr + token)
    later = tl.load(sequences_ptr + token + 1, mask=token + 1 < num_tokens, other=-1)
    if (later != sequence) & (tl.load(positions_ptr + token) >= 0):
        number = tl.arange(0, PADDED)
        values = tl.load(kept_ptr + sequence * NUM + number, mask=number < NUM)
        tl.store(state_ptr + tl.load(slots_ptr + token) * state_stride + number, values, mask=number < NUM)


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
    """As the reference, in fp32; D a power of two; `projected` may be columns of a wider matrix."""
    tokens, dim = len(projected), state.shape[-1]
    assert projected.stride(1) == 1 and ape.is_contiguous() and state[0].is_contiguous() and projected.shape[1] == 2 * dim
    if not tokens:
        return
    kept = state if places.is_decode else torch.empty(len(places.page_table_SP), 3, dim, device=state.device)
    compress_c128_kernel[(tokens,)](
        projected, ape, state, kept, places.positions_T, places.sequences_T, places.starts_T, places.slots_T, places.page_table_SP,
        norm_weight, cos, sin, pool.data, pool.scale, tokens, eps,
        projected.stride(0), state.stride(0), places.page_table_SP.stride(0), pool.data.stride(0), pool.scale.stride(0), pool.data.shape[1],
        DIM=dim, ROPE=2 * cos.shape[1], FORM=form_name(pool.form),
        DATA_BYTES=pool.form.data_bytes, SCALE_BYTES=pool.form.scale_bytes, BF16=dtype == torch.bfloat16,
        BATCH=1 if places.is_decode else BATCH, num_warps=max(1, dim // 128),
    )  # fmt: skip
    if not places.is_decode:
        move_states_kernel[(tokens,)](
            kept, state, places.positions_T, places.sequences_T, places.slots_T, tokens, state.stride(0),
            NUM=3 * dim, PADDED=triton.next_power_of_2(3 * dim), num_warps=4,
        )  # fmt: skip


AOT = [
    (
        compress_c128_kernel,
        SIGNATURE | {"state_ptr": "*fp32", "kept_ptr": "*fp32", "state_stride": "i32:16"},
        dict(zip(("DIM", "ROPE", "FORM", "DATA_BYTES", "SCALE_BYTES", "BF16", "BATCH"), values, strict=True)),
        {"num_warps": 4},
    )
    for values in ((512, 64, "fp8_kv", 576, 8, True, 1), (512, 64, "fp8_kv", 576, 8, True, BATCH))
] + [
    (
        move_states_kernel,
        {
            **dict.fromkeys(("kept_ptr", "state_ptr"), "*fp32"),
            **dict.fromkeys(("positions_ptr", "sequences_ptr", "slots_ptr"), "*i64"),
            "num_tokens": "i32",
            "state_stride": "i32:16",
        },
        {"NUM": 1536, "PADDED": 2048},
        {"num_warps": 4},
    )
]

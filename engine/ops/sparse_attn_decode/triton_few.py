"""Sparse decode attention of few sequences, whose rows are few too, or of one: two short launches over many programs.

    scores    a tile of a sequence's rows, some heads                     -> q K scaled, fp32 [S, H, window | entries]
    values    some channels of a sequence, some heads: softmax, times V   -> o, turned back

No program's result is a part of a sum with another's, so nothing is combined afterwards. Only the entries of one sequence alone, if they
are many, have values in several programs: triton_long.py. Kernels for long lists (FlashMLA's, that of triton.py) give a sequence of 640
rows to two or a few programs, each of which goes through its rows in turn; one of 7,200 to all, whose results, of all heads and channels,
a few programs combine.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from engine.cache.arena import RowPool
from engine.cache.rows import Fp8KvRows
from engine.ops.sparse_attn_decode import triton_long
from engine.ops.sparse_attn_decode.triton_common import CODES, channels, listed, turned_back

MOST_SEQUENCES = 8
MOST_ENTRIES = 1024
"""Entries of a sequence that one program can hold the weights of."""
MOST_ALONE = 8192
"""Entries of one sequence alone."""
MOST_WHOLE = 64 if triton.knobs.runtime.interpret else 512
"""Entries of one sequence that programs of `values` take whole. Interpreted few, so that small cases have more."""
HEADS = 16
"""Of a program."""
ROWS = 32
"""Of a program of `scores`."""
MANY, HEADS_OF_MANY = 4096, 64
"""From so many entries of one sequence on a program of `scores` has more heads."""
COLUMNS, MORE_COLUMNS = 32, 64
"""Channels of a program of `values`, of one scale: of up to three sequences, and of more."""
SCORES_WARPS, VALUES_WARPS = 4, 8


@triton.jit
def _products(
    q_ptr, real, data_ptr, scale_ptr, stride, rows, PER_UNIT: tl.constexpr, WIDTH: tl.constexpr, FP8: tl.constexpr, DOT: tl.constexpr
):
    """fp32 [HEADS, N] of the heads at q_ptr [HEADS, 1] with rows of a pool; unused rows count as zero."""
    N: tl.constexpr = rows.shape[0]
    used = rows >= 0
    unit, row = tl.maximum(rows, 0) // PER_UNIT, tl.maximum(rows, 0) % PER_UNIT
    column = tl.arange(0, WIDTH)
    if FP8:
        TAIL: tl.constexpr = WIDTH - CODES
        group, inner, tail = tl.arange(0, WIDTH // 64), tl.arange(0, 64), tl.arange(0, TAIL)
        base = data_ptr + unit * stride + row * (CODES + 2 * TAIL)
        mask = used[:, None] & (group < CODES // 64)[None, :]
        codes = tl.load(base[:, None, None] + group[None, :, None] * 64 + inner[None, None, :], mask=tl.expand_dims(mask, 2), other=0)
        exponent = tl.load(scale_ptr + (unit * stride + row * 8)[:, None] + group[None, :], mask=mask, other=0)
        last = tl.load((base + CODES).to(tl.pointer_type(tl.bfloat16))[:, None] + tail[None, :], mask=used[:, None], other=0.0)
        q = tl.load(q_ptr + column[None, :], mask=real[:, None] & (column < CODES)[None, :], other=0.0)
        q_last = tl.load(q_ptr + CODES + tail[None, :], mask=real[:, None], other=0.0)
        power = (exponent.to(tl.int32) << 23).to(tl.float32, bitcast=True)
        k = codes.to(tl.float8e4nv, bitcast=True).to(tl.float32) * tl.expand_dims(power, 2)
        k = tl.reshape(k.to(DOT), [N, WIDTH])
        out = tl.dot(q.to(tl.float32).to(DOT), tl.trans(k), input_precision="ieee")
        out = tl.dot(q_last.to(tl.float32).to(DOT), tl.trans(last.to(tl.float32).to(DOT)), out, input_precision="ieee")
    else:
        base = (data_ptr + unit * stride).to(tl.pointer_type(tl.bfloat16)) + row * WIDTH
        k = tl.load(base[:, None] + column[None, :], mask=used[:, None], other=0.0)
        q = tl.load(q_ptr + column[None, :], mask=real[:, None], other=0.0)
        out = tl.dot(q.to(tl.float32).to(DOT), tl.trans(k.to(tl.float32).to(DOT)), input_precision="ieee")
    return out


@triton.jit
def attn_scores_kernel(
    q_ptr, window_ptr, window_scale_ptr, window_stride, window_rows_ptr, num_window,
    entries_ptr, entries_scale_ptr, entries_stride, entry_rows_ptr, entry_row_stride, num_entries_ptr,
    scores_ptr, num_heads, length, scale,
    WINDOW_PER_UNIT: tl.constexpr, ENTRIES_PER_UNIT: tl.constexpr, WINDOW: tl.constexpr, WIDTH: tl.constexpr, FP8: tl.constexpr,
    HEADS: tl.constexpr, ROWS: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Program (s, block of heads, tile): columns [tile * ROWS, ...) of scores [S, H, length]; the first WINDOW are the window's."""
    sequence, column = tl.program_id(0).to(tl.int64), tl.program_id(2) * ROWS
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    real = head < num_heads
    q_rows = q_ptr + (sequence * num_heads + head)[:, None] * WIDTH
    if column < WINDOW:
        rows = listed(window_rows_ptr + sequence * num_window, column, num_window, ROWS)
        out = _products(q_rows, real, window_ptr, window_scale_ptr, window_stride, rows, WINDOW_PER_UNIT, WIDTH, FP8, DOT)
    else:
        count = tl.load(num_entries_ptr + sequence)
        if column - WINDOW >= count:
            return
        rows = listed(entry_rows_ptr + sequence * entry_row_stride, column - WINDOW, count, ROWS)
        out = _products(q_rows, real, entries_ptr, entries_scale_ptr, entries_stride, rows, ENTRIES_PER_UNIT, WIDTH, FP8, DOT)
    out = tl.where((rows >= 0)[None, :], out * scale, float("-inf"))
    at = scores_ptr + (sequence * num_heads + head)[:, None] * length + column + tl.arange(0, ROWS)[None, :]
    tl.store(at, out, mask=real[:, None])


@triton.jit
def attn_values_kernel(
    scores_ptr, sink_ptr, window_ptr, window_scale_ptr, window_stride, window_rows_ptr, num_window,
    entries_ptr, entries_scale_ptr, entries_stride, entry_rows_ptr, entry_row_stride, num_entries_ptr,
    cos_ptr, sin_ptr, out_ptr, num_heads, length,
    WINDOW_PER_UNIT: tl.constexpr, ENTRIES_PER_UNIT: tl.constexpr, WINDOW: tl.constexpr, ENTRIES: tl.constexpr,
    WIDTH: tl.constexpr, ROPE: tl.constexpr, FP8: tl.constexpr, HEADS: tl.constexpr, COLUMNS: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Program (s, block of heads, block of channels). ENTRIES: at most, 0 or a power of two."""
    sequence, first = tl.program_id(0).to(tl.int64), tl.program_id(2) * COLUMNS
    column = tl.arange(0, COLUMNS)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    real = head < num_heads
    at = scores_ptr + (sequence * num_heads + head)[:, None] * length
    sink = tl.load(sink_ptr + head, mask=real, other=0.0)
    place = tl.arange(0, WINDOW)
    window_rows = listed(window_rows_ptr + sequence * num_window, 0, num_window, WINDOW)
    window = tl.load(at + place[None, :], mask=real[:, None], other=float("-inf"))
    top = tl.maximum(sink, tl.max(window, 1))
    if ENTRIES:
        place = tl.arange(0, ENTRIES)
        count = tl.load(num_entries_ptr + sequence)
        entry_rows = listed(entry_rows_ptr + sequence * entry_row_stride, 0, count, ENTRIES)
        entries = tl.load(at + WINDOW + place[None, :], mask=real[:, None] & (place < count)[None, :], other=float("-inf"))
        top = tl.maximum(top, tl.max(entries, 1))
    weights = tl.exp(window - top[:, None])
    total = tl.exp(sink - top) + tl.sum(weights, 1)
    v = channels(window_ptr, window_scale_ptr, window_stride, window_rows, first, WINDOW_PER_UNIT, WIDTH, FP8, COLUMNS, DOT)
    acc = tl.dot(weights.to(DOT), v, input_precision="ieee")
    if ENTRIES:
        weights = tl.exp(entries - top[:, None])
        total += tl.sum(weights, 1)
        v = channels(entries_ptr, entries_scale_ptr, entries_stride, entry_rows, first, ENTRIES_PER_UNIT, WIDTH, FP8, COLUMNS, DOT)
        acc = tl.dot(weights.to(DOT), v, acc, input_precision="ieee")
    acc = turned_back(acc / total[:, None], cos_ptr + sequence * (ROPE // 2), sin_ptr + sequence * (ROPE // 2), first, WIDTH, ROPE)
    out = out_ptr + (sequence * num_heads + head)[:, None] * WIDTH + first + column[None, :]
    tl.store(out, acc, mask=real[:, None])


def takes(sequences: int, num_entries: int) -> bool:
    """Whether these kernels are for so many sequences and rows of `entry_rows`."""
    return num_entries <= (MOST_ALONE if sequences == 1 else MOST_ENTRIES) and sequences <= MOST_SEQUENCES


def run_few(
    q: torch.Tensor,
    window: RowPool,
    window_rows: torch.Tensor,
    entries: RowPool | None,
    entry_rows: torch.Tensor,
    num_entries: torch.Tensor,
    sink: torch.Tensor,
    scale: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
    memo: dict[str, Any],
) -> torch.Tensor:
    """As the reference, for at least one sequence and what `takes` admits."""
    sequences, heads, width = q.shape
    out = torch.empty_like(q)
    most = 0 if entries is None else entry_rows.shape[1]
    entries = window if entries is None else entries
    padded_window, padded = triton.next_power_of_2(window_rows.shape[1]), triton.next_power_of_2(max(ROWS, most)) if most else 0
    length = padded_window + padded
    scores = torch.empty(sequences, heads, length, dtype=torch.float32, device=q.device)
    assert q.is_contiguous() and window_rows.is_contiguous() and window_rows.shape[1] >= ROWS, f"{q.stride()=} {window_rows.shape=}"
    window_pool = window.data, window.scale, window.data.stride(0), window_rows, window_rows.shape[1]
    pool = entries.data, entries.scale, entries.data.stride(0), entry_rows
    shared = {
        "WINDOW_PER_UNIT": window.data.shape[1], "ENTRIES_PER_UNIT": entries.data.shape[1], "WINDOW": padded_window, "WIDTH": width,
        "FP8": isinstance(window.form, Fp8KvRows), "DOT": tl.bfloat16 if q.is_cuda else tl.float32,
    }  # fmt: skip
    of_scores = HEADS_OF_MANY if sequences == 1 and most >= MANY else HEADS
    attn_scores_kernel[(sequences, triton.cdiv(heads, of_scores), padded_window // ROWS + triton.cdiv(most, ROWS))](
        q, *window_pool, *pool, entry_rows.stride(0), num_entries, scores, heads, length, scale, **shared, HEADS=of_scores, ROWS=ROWS,
        num_warps=SCORES_WARPS,
    )  # fmt: skip
    if sequences == 1 and padded > MOST_WHOLE:
        blocks, columns = triton.cdiv(heads, triton_long.HEADS), width // triton_long.COLUMNS
        part = (triton_long.COLUMNS + 2) * triton_long.HEADS
        parts = torch.empty(blocks * columns * triton_long.SHARES * part, dtype=torch.float32, device=q.device)
        if "arrived" not in memo:
            memo["arrived"] = torch.zeros(blocks * columns, dtype=torch.int32, device=q.device)
        triton_long.attn_long_values_kernel[(triton_long.SHARES, blocks, columns)](
            scores, sink, *window_pool, *pool, num_entries, cos, sin, out, parts, memo["arrived"], heads, length, **shared,
            ROPE=2 * cos.shape[1], **triton_long.CUT, num_warps=triton_long.WARPS,
        )  # fmt: skip
        return out
    columns = COLUMNS if sequences < 4 else MORE_COLUMNS
    attn_values_kernel[(sequences, triton.cdiv(heads, HEADS), width // columns)](
        scores, sink, *window_pool, *pool, entry_rows.stride(0), num_entries, cos, sin, out, heads, length, **shared, ENTRIES=padded,
        ROPE=2 * cos.shape[1], HEADS=HEADS, COLUMNS=columns, num_warps=VALUES_WARPS,
    )  # fmt: skip
    return out


_SCORED = triton_long.POOLS | {"entry_row_stride": "i64:16"}
AOT = [
    one
    for per_unit, fp8, most, columns, of_scores in (
        (64, True, 512, COLUMNS, HEADS),
        (64, True, 1024, MORE_COLUMNS, HEADS),
        (2, True, 64, MORE_COLUMNS, HEADS),
        (2, True, 512, COLUMNS, HEADS_OF_MANY),
        (64, False, 512, MORE_COLUMNS, HEADS),
        (128, True, 0, COLUMNS, HEADS),
    )
    for one in (
        (
            attn_scores_kernel,
            _SCORED | {"q_ptr": "*bf16", "scale": "fp32"},
            triton_long.SHARED | {"ENTRIES_PER_UNIT": per_unit, "FP8": fp8, "HEADS": of_scores, "ROWS": ROWS},
            {"num_warps": SCORES_WARPS},
        ),
        (
            attn_values_kernel,
            _SCORED | triton_long.OUTPUT,
            triton_long.SHARED
            | {"ENTRIES_PER_UNIT": per_unit, "FP8": fp8, "HEADS": HEADS, "ENTRIES": most, "ROPE": 64, "COLUMNS": columns},
            {"num_warps": VALUES_WARPS},
        ),
    )
]

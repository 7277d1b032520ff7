"""The second launch of triton_few.py for one sequence of many entries: a program goes through a share of them, the last one combines.

A program has 64 channels of 16 heads, and there are as many programs as multiprocessors can hold at once, whatever the number of entries.
Rows, scores and codes of a tile are on their way while the tile before is summed up; the maximum is that of the tiles so far.
"""

from __future__ import annotations

import triton
import triton.language as tl

from engine.ops.sparse_attn_decode.triton_common import CODES, channels, listed, turned_back
from engine.ops.triton_splits import is_last

SHARES = 8
"""With 64 heads and 512 channels 256 programs."""
HEADS, COLUMNS = 16, 64
TILE = 16 if triton.knobs.runtime.interpret else 128
"""Entries at a time. Interpreted few, so that small cases have several tiles a share."""
WARPS = 8
"""With tiles of 128 two programs fit a multiprocessor."""
CUT = {"SHARES": SHARES, "HEADS": HEADS, "COLUMNS": COLUMNS, "TILE": TILE}


@triton.jit
def _places(rows_ptr, place, end):
    """int32 rows of a list at these places, -1 from its end on."""
    return tl.load(rows_ptr + place, mask=place < end, other=-1)


@triton.jit
def _scores(scores, place, end):
    return tl.load(scores + place[None, :], mask=(place < end)[None, :], other=float("-inf"))


@triton.jit
def _fetched(
    data_ptr, scale_ptr, stride, rows, first, PER_UNIT: tl.constexpr, WIDTH: tl.constexpr, FP8: tl.constexpr, CODED: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """As they lie there: channels [first, first + COLUMNS) of rows of a pool [N, COLUMNS], zero where unused, and, if they are `CODED`,
    the rows' scales as bytes [N]."""
    used, row = rows >= 0, tl.maximum(rows, 0)
    unit, row, column = (row // PER_UNIT).to(tl.int64) * stride, row % PER_UNIT, tl.arange(0, COLUMNS)
    scale = row
    if CODED:
        scale = tl.load(scale_ptr + unit + row * 8 + first // 64, mask=used, other=0)
        base = data_ptr + unit + row * (2 * WIDTH - CODES) + first
    elif FP8:
        base = (data_ptr + unit + row * (2 * WIDTH - CODES) + CODES).to(tl.pointer_type(tl.bfloat16)) + (first - CODES)
    else:
        base = (data_ptr + unit).to(tl.pointer_type(tl.bfloat16)) + row * WIDTH + first
    return tl.load(base[:, None] + column[None, :], mask=used[:, None], other=0), scale


@triton.jit
def _summed(
    top, total, acc, scores, rows_ptr, begin, end, data_ptr, scale_ptr, stride, first,
    PER_UNIT: tl.constexpr, WIDTH: tl.constexpr, FP8: tl.constexpr, CODED: tl.constexpr, COLUMNS: tl.constexpr, TILE: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    """Maximum, sum of weights and weighted sum of channels, all in fp32, with those of entries [begin, end) besides."""
    tile = tl.arange(0, TILE)
    rows = _places(rows_ptr, begin + tile, end)
    v, scale = _fetched(data_ptr, scale_ptr, stride, rows, first, PER_UNIT, WIDTH, FP8, CODED, COLUMNS)
    found = _scores(scores, begin + tile, end)
    rows = _places(rows_ptr, begin + TILE + tile, end)
    for start in range(begin, end, TILE):
        next_v, next_scale = _fetched(data_ptr, scale_ptr, stride, rows, first, PER_UNIT, WIDTH, FP8, CODED, COLUMNS)
        next_found = _scores(scores, start + TILE + tile, end)
        rows = _places(rows_ptr, start + 2 * TILE + tile, end)
        before = top
        top = tl.maximum(top, tl.max(found, 1))
        factor, weights = tl.exp(before - top), tl.exp(found - top[:, None])
        total = total * factor + tl.sum(weights, 1)
        if CODED:  # a row's scale is a power of two: it may as well be its weight's
            weights *= (scale.to(tl.int32) << 23).to(tl.float32, bitcast=True)[None, :]
            v = v.to(tl.float8e4nv, bitcast=True)
        acc = tl.dot(weights.to(DOT), v.to(tl.float32).to(DOT), acc * factor[:, None], input_precision="ieee")
        v, scale, found = next_v, next_scale, next_found
    return top, total, acc


@triton.jit
def attn_long_values_kernel(
    scores_ptr, sink_ptr, window_ptr, window_scale_ptr, window_stride, window_rows_ptr, num_window,
    entries_ptr, entries_scale_ptr, entries_stride, entry_rows_ptr, num_entries_ptr,
    cos_ptr, sin_ptr, out_ptr, parts_ptr, arrived_ptr, num_heads, length,
    WINDOW_PER_UNIT: tl.constexpr, ENTRIES_PER_UNIT: tl.constexpr, WINDOW: tl.constexpr, SHARES: tl.constexpr, TILE: tl.constexpr,
    WIDTH: tl.constexpr, ROPE: tl.constexpr, FP8: tl.constexpr, HEADS: tl.constexpr, COLUMNS: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Program (share, block of heads, block of channels). The last share, which may be the smallest, has window and sink, too.
    parts: fp32, of each block [SHARES, COLUMNS + 2, HEADS], of which the last two are maxima and sums."""
    share, first = tl.program_id(0), tl.program_id(2) * COLUMNS
    count = tl.load(num_entries_ptr)
    size = tl.maximum(tl.cdiv(count, SHARES * TILE), 1) * TILE
    shares = tl.maximum(tl.cdiv(count, size), 1)
    if share >= shares:
        return
    lane, column = tl.arange(0, HEADS), tl.arange(0, COLUMNS)
    real = tl.program_id(1) * HEADS + lane < num_heads
    head = tl.minimum(tl.program_id(1) * HEADS + lane, num_heads - 1)
    scores = scores_ptr + head[:, None] * length
    top, total = tl.full([HEADS], float("-inf"), tl.float32), tl.zeros([HEADS], tl.float32)
    acc = tl.zeros([HEADS, COLUMNS], tl.float32)
    if share == shares - 1:
        window, sink = tl.load(scores + tl.arange(0, WINDOW)[None, :]), tl.load(sink_ptr + head)
        top = tl.maximum(sink, tl.max(window, 1))
        weights = tl.exp(window - top[:, None])
        total = tl.exp(sink - top) + tl.sum(weights, 1)
        rows = listed(window_rows_ptr, 0, num_window, WINDOW)
        v = channels(window_ptr, window_scale_ptr, window_stride, rows, first, WINDOW_PER_UNIT, WIDTH, FP8, COLUMNS, DOT)
        acc = tl.dot(weights.to(DOT), v, input_precision="ieee")
    scores, begin = scores + WINDOW, share * size
    end = tl.minimum(begin + size, count)
    if FP8 and first < CODES:
        top, total, acc = _summed(
            top, total, acc, scores, entry_rows_ptr, begin, end, entries_ptr, entries_scale_ptr, entries_stride, first,
            ENTRIES_PER_UNIT, WIDTH, FP8, True, COLUMNS, TILE, DOT,
        )  # fmt: skip
    else:
        top, total, acc = _summed(
            top, total, acc, scores, entry_rows_ptr, begin, end, entries_ptr, entries_scale_ptr, entries_stride, first,
            ENTRIES_PER_UNIT, WIDTH, FP8, False, COLUMNS, TILE, DOT,
        )  # fmt: skip
    block = tl.program_id(1) * (WIDTH // COLUMNS) + tl.program_id(2)
    SIZE: tl.constexpr = (COLUMNS + 2) * HEADS
    parts_ptr += block * (SHARES * SIZE)
    own = parts_ptr + share * SIZE
    tl.store(own + column[None, :] * HEADS + lane[:, None], acc)
    tl.store(own + COLUMNS * HEADS + lane, top)
    tl.store(own + (COLUMNS + 1) * HEADS + lane, total)
    if not is_last(arrived_ptr + block, shares):
        return
    every = tl.arange(0, SHARES)[:, None]
    tops = tl.load(
        parts_ptr + every * SIZE + COLUMNS * HEADS + lane[None, :], mask=every < shares, other=float("-inf"), cache_modifier=".cg"
    )
    top = tl.max(tops, 0)
    total = tl.zeros([HEADS], tl.float32)
    acc = tl.zeros([HEADS, COLUMNS], tl.float32)
    for other in tl.static_range(SHARES):  # unrolled: all parts are asked for before the first is there
        part, there = parts_ptr + other * SIZE, other < shares
        factor = tl.exp(tl.load(part + COLUMNS * HEADS + lane, mask=there, other=float("-inf"), cache_modifier=".cg") - top)
        total += tl.load(part + (COLUMNS + 1) * HEADS + lane, mask=there, other=0.0, cache_modifier=".cg") * factor
        found = tl.load(part + column[None, :] * HEADS + lane[:, None], mask=there, other=0.0, cache_modifier=".cg")
        acc += found * factor[:, None]
    acc = turned_back(acc / total[:, None], cos_ptr, sin_ptr, first, WIDTH, ROPE)
    tl.store(out_ptr + head[:, None] * WIDTH + first + column[None, :], acc, mask=real[:, None])


POOLS = {"window_ptr": "*u8", "window_scale_ptr": "*u8", "window_stride": "i64:16", "window_rows_ptr": "*i32", "num_window": "i32:16"}
POOLS |= {"entries_ptr": "*u8", "entries_scale_ptr": "*u8", "entries_stride": "i64:16", "entry_rows_ptr": "*i32"}
POOLS |= {"num_entries_ptr": "*i32", "scores_ptr": "*fp32", "num_heads": "i32:16", "length": "i32:16"}
OUTPUT = {"sink_ptr": "*fp32", "cos_ptr": "*fp32", "sin_ptr": "*fp32", "out_ptr": "*bf16"}
SHARED = {"WINDOW": 128, "WIDTH": 512, "DOT": tl.bfloat16, "WINDOW_PER_UNIT": 128}
AOT = [
    (
        attn_long_values_kernel,
        POOLS | OUTPUT | {"parts_ptr": "*fp32", "arrived_ptr": "*i32"},
        SHARED | CUT | {"ENTRIES_PER_UNIT": per_unit, "FP8": fp8, "ROPE": 64},
        {"num_warps": WARPS},
    )
    for per_unit, fp8 in ((2, True), (2, False))
]

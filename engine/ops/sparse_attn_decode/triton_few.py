"""Sparse decode attention of few sequences, whose rows are few too, or of one: two short launches over many programs.

    scores    a tile of a sequence's rows, some heads                     -> q K scaled, fp32 [S, H, window | entries]
    values    some channels of a sequence, some heads: softmax, times V   -> o, turned back

No program's result is a part of a sum with another's, so nothing is combined afterwards. Only the entries of one sequence alone, if they
are many, have values in several programs, and the last one of those puts their results together: a program has 64 channels of 16 heads,
so there are many to do that. Kernels for long lists (FlashMLA's, that of triton.py) give a sequence of 640 rows to two or a few programs,
each of which goes through its rows in turn; one of 7,200 to all, whose results, of all heads and channels, a few programs combine.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from engine.cache.arena import RowPool
from engine.cache.rows import Fp8KvRows
from engine.ops.triton_splits import is_last

MOST_SEQUENCES = 8
MOST_ENTRIES = 1024
"""Entries of a sequence that one program can hold the weights of."""
MOST_ALONE = 8192
"""Entries of one sequence alone."""
MOST_WHOLE, SHARE = (64, 64) if triton.knobs.runtime.interpret else (512, 256)
"""Entries of one sequence that programs of `values` take whole; where there may be more, so many each. Interpreted few, so that small cases
have several shares."""
HEADS = 16
"""Of a program."""
ROWS = 32
"""Of a program of `scores`."""
COLUMNS, MORE_COLUMNS = 32, 64
"""Channels of a program of `values`, of one scale: of up to three sequences, and of more, or of one in shares."""
SCORES_WARPS, VALUES_WARPS = 4, 8
CODES = tl.constexpr(448)
"""Channels of an FP8 row before those in bf16; its scales are of 64 channels each."""


@triton.jit
def _listed(rows_ptr, first, count, N: tl.constexpr):
    """Rows [first, first + N) of a list of `count`: int64, -1 unused."""
    place = first + tl.arange(0, N)
    return tl.load(rows_ptr + place, mask=place < count, other=-1).to(tl.int64)


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
        rows = _listed(window_rows_ptr + sequence * num_window, column, num_window, ROWS)
        out = _products(q_rows, real, window_ptr, window_scale_ptr, window_stride, rows, WINDOW_PER_UNIT, WIDTH, FP8, DOT)
    else:
        count = tl.load(num_entries_ptr + sequence)
        if column - WINDOW >= count:
            return
        rows = _listed(entry_rows_ptr + sequence * entry_row_stride, column - WINDOW, count, ROWS)
        out = _products(q_rows, real, entries_ptr, entries_scale_ptr, entries_stride, rows, ENTRIES_PER_UNIT, WIDTH, FP8, DOT)
    out = tl.where((rows >= 0)[None, :], out * scale, float("-inf"))
    at = scores_ptr + (sequence * num_heads + head)[:, None] * length + column + tl.arange(0, ROWS)[None, :]
    tl.store(at, out, mask=real[:, None])


@triton.jit
def _channels(
    data_ptr, scale_ptr, stride, rows, first, PER_UNIT: tl.constexpr, WIDTH: tl.constexpr, FP8: tl.constexpr, COLUMNS: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    """DOT [N, COLUMNS]: channels [first, first + COLUMNS) of rows of a pool, zero where unused."""
    used = rows >= 0
    unit, row = tl.maximum(rows, 0) // PER_UNIT, tl.maximum(rows, 0) % PER_UNIT
    column = first + tl.arange(0, COLUMNS)
    if FP8:
        base = data_ptr + unit * stride + row * (2 * WIDTH - CODES)
        if first < CODES:
            codes = tl.load(base[:, None] + column[None, :], mask=used[:, None], other=0)
            exponent = tl.load(scale_ptr + unit * stride + row * 8 + first // 64, mask=used, other=0)
            power = (exponent.to(tl.int32) << 23).to(tl.float32, bitcast=True)
            v = (codes.to(tl.float8e4nv, bitcast=True).to(tl.float32) * power[:, None]).to(DOT)
        else:
            last = (base + CODES).to(tl.pointer_type(tl.bfloat16))
            v = tl.load(last[:, None] + (column - CODES)[None, :], mask=used[:, None], other=0.0).to(tl.float32).to(DOT)
    else:
        base = (data_ptr + unit * stride).to(tl.pointer_type(tl.bfloat16)) + row * WIDTH
        v = tl.load(base[:, None] + column[None, :], mask=used[:, None], other=0.0).to(tl.float32).to(DOT)
    return v


@triton.jit
def attn_values_kernel(
    scores_ptr, sink_ptr, window_ptr, window_scale_ptr, window_stride, window_rows_ptr, num_window,
    entries_ptr, entries_scale_ptr, entries_stride, entry_rows_ptr, entry_row_stride, num_entries_ptr,
    cos_ptr, sin_ptr, out_ptr, parts_ptr, arrived_ptr, num_heads, length,
    WINDOW_PER_UNIT: tl.constexpr, ENTRIES_PER_UNIT: tl.constexpr, WINDOW: tl.constexpr, ENTRIES: tl.constexpr, SHARES: tl.constexpr,
    WIDTH: tl.constexpr, ROPE: tl.constexpr, FP8: tl.constexpr, HEADS: tl.constexpr, COLUMNS: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Program (s, block of heads, block of channels and share of entries). ENTRIES: of a share at most, 0 or a power of two. The first
    share has window and sink, too. parts: fp32, of each block [SHARES, COLUMNS + 2, HEADS], of which the last two are maxima and sums."""
    sequence, first = tl.program_id(0).to(tl.int64), tl.program_id(2) // SHARES * COLUMNS
    lane, column = tl.arange(0, HEADS), tl.arange(0, COLUMNS)
    head = tl.program_id(1) * HEADS + lane
    real = head < num_heads
    at = scores_ptr + (sequence * num_heads + head)[:, None] * length
    sink = tl.load(sink_ptr + head, mask=real, other=0.0)
    top, before, has_window = sink, 0, real
    if SHARES > 1:
        share, shares = tl.program_id(2) % SHARES, tl.maximum(tl.cdiv(tl.load(num_entries_ptr + sequence), ENTRIES), 1)
        if share >= shares:
            return
        before, has_window, num_window = share * ENTRIES, real & (share == 0), tl.where(share == 0, num_window, 0)
        sink = tl.where(share == 0, sink, float("-inf"))
    place = tl.arange(0, WINDOW)
    window_rows = _listed(window_rows_ptr + sequence * num_window, 0, num_window, WINDOW)
    window = tl.load(at + place[None, :], mask=has_window[:, None], other=float("-inf"))
    top = tl.maximum(top, tl.max(window, 1))
    if ENTRIES:
        place = before + tl.arange(0, ENTRIES)
        count = tl.load(num_entries_ptr + sequence)
        entry_rows = _listed(entry_rows_ptr + sequence * entry_row_stride, before, count, ENTRIES)
        entries = tl.load(at + WINDOW + place[None, :], mask=real[:, None] & (place < count)[None, :], other=float("-inf"))
        top = tl.maximum(top, tl.max(entries, 1))
    weights = tl.exp(window - top[:, None])
    total = tl.exp(sink - top) + tl.sum(weights, 1)
    v = _channels(window_ptr, window_scale_ptr, window_stride, window_rows, first, WINDOW_PER_UNIT, WIDTH, FP8, COLUMNS, DOT)
    acc = tl.dot(weights.to(DOT), v, input_precision="ieee")
    if ENTRIES:
        weights = tl.exp(entries - top[:, None])
        total += tl.sum(weights, 1)
        v = _channels(entries_ptr, entries_scale_ptr, entries_stride, entry_rows, first, ENTRIES_PER_UNIT, WIDTH, FP8, COLUMNS, DOT)
        acc = tl.dot(weights.to(DOT), v, acc, input_precision="ieee")
    if SHARES > 1:
        block = (sequence * tl.num_programs(1) + tl.program_id(1)) * (WIDTH // COLUMNS) + first // COLUMNS
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
    acc = acc / total[:, None]
    if first + COLUMNS > WIDTH - ROPE:
        pair = first // 2 + tl.arange(0, COLUMNS // 2) - (WIDTH - ROPE) // 2
        c = tl.load(cos_ptr + sequence * (ROPE // 2) + pair, mask=pair >= 0, other=1.0)[None, :]
        s = tl.load(sin_ptr + sequence * (ROPE // 2) + pair, mask=pair >= 0, other=0.0)[None, :]
        even, odd = tl.split(tl.reshape(acc, [HEADS, COLUMNS // 2, 2]))
        acc = tl.reshape(tl.join(even * c + odd * s, odd * c - even * s), [HEADS, COLUMNS])
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
    length, shares = padded_window + padded, padded // SHARE if sequences == 1 and padded > MOST_WHOLE else 1
    scores = torch.empty(sequences, heads, length, dtype=torch.float32, device=q.device)
    blocks, tiles = triton.cdiv(heads, HEADS), padded_window // ROWS + triton.cdiv(most, ROWS)
    assert q.is_contiguous() and window_rows.is_contiguous() and window_rows.shape[1] >= ROWS, f"{q.stride()=} {window_rows.shape=}"
    pools = (
        window.data, window.scale, window.data.stride(0), window_rows, window_rows.shape[1],
        entries.data, entries.scale, entries.data.stride(0), entry_rows, entry_rows.stride(0), num_entries,
    )  # fmt: skip
    shared = {
        "WINDOW_PER_UNIT": window.data.shape[1], "ENTRIES_PER_UNIT": entries.data.shape[1], "WINDOW": padded_window, "WIDTH": width,
        "FP8": isinstance(window.form, Fp8KvRows), "HEADS": HEADS, "DOT": tl.bfloat16 if q.is_cuda else tl.float32,
    }  # fmt: skip
    attn_scores_kernel[(sequences, blocks, tiles)](q, *pools, scores, heads, length, scale, **shared, ROWS=ROWS, num_warps=SCORES_WARPS)
    columns = COLUMNS if sequences < 4 and shares == 1 else MORE_COLUMNS
    parts, arrived = out, out  # of no use to one share
    if shares > 1:
        programs = sequences * blocks * (width // columns)
        parts = torch.empty(programs * shares * (columns + 2) * HEADS, dtype=torch.float32, device=q.device)
        if "arrived" not in memo:
            memo["arrived"] = torch.zeros(programs, dtype=torch.int32, device=q.device)
        arrived = memo["arrived"]
    attn_values_kernel[(sequences, blocks, width // columns * shares)](
        scores, sink, *pools, cos, sin, out, parts, arrived, heads, length, **shared, ENTRIES=padded // shares, SHARES=shares,
        ROPE=2 * cos.shape[1], COLUMNS=columns, num_warps=VALUES_WARPS,
    )  # fmt: skip
    return out


_POOLS = {"window_ptr": "*u8", "window_scale_ptr": "*u8", "window_stride": "i64:16", "window_rows_ptr": "*i32", "num_window": "i32:16"}
_POOLS |= {"entries_ptr": "*u8", "entries_scale_ptr": "*u8", "entries_stride": "i64:16", "entry_rows_ptr": "*i32"}
_POOLS |= {"entry_row_stride": "i64:16", "num_entries_ptr": "*i32", "scores_ptr": "*fp32", "num_heads": "i32:16", "length": "i32:16"}
_OUTPUT = {"sink_ptr": "*fp32", "cos_ptr": "*fp32", "sin_ptr": "*fp32", "out_ptr": "*bf16"}
_SHARED = {"WINDOW": 128, "WIDTH": 512, "HEADS": HEADS, "DOT": tl.bfloat16, "WINDOW_PER_UNIT": 128}
AOT = [
    one
    for per_unit, fp8, most, shares, columns in (
        (64, True, 512, 1, COLUMNS),
        (64, True, 1024, 1, MORE_COLUMNS),
        (2, True, 64, 1, MORE_COLUMNS),
        (2, True, 256, 4, MORE_COLUMNS),
        (2, True, 256, 32, MORE_COLUMNS),
        (64, False, 512, 1, MORE_COLUMNS),
        (128, True, 0, 1, COLUMNS),
    )
    for one in (
        (
            attn_scores_kernel,
            _POOLS | {"q_ptr": "*bf16", "scale": "fp32"},
            _SHARED | {"ENTRIES_PER_UNIT": per_unit, "FP8": fp8, "ROWS": ROWS},
            {"num_warps": SCORES_WARPS},
        ),
        (
            attn_values_kernel,
            _POOLS | _OUTPUT | {"parts_ptr": "*fp32" if shares > 1 else "*bf16", "arrived_ptr": "*i32" if shares > 1 else "*bf16"},
            _SHARED | {"ENTRIES_PER_UNIT": per_unit, "FP8": fp8, "ENTRIES": most, "SHARES": shares, "ROPE": 64, "COLUMNS": columns},
            {"num_warps": VALUES_WARPS},
        ),
    )
]

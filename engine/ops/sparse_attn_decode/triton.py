"""Sparse decode attention with Triton alone: the rows of a sequence are dealt out to several programs, and their results combined.

Rows are widened to bf16 in registers, which holds every value of every row format exactly.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from engine.cache.arena import RowPool
from engine.cache.rows import Fp8KvRows
from engine.ops.output_derotate.triton import run as output_derotate
from engine.ops.sparse_attn_decode.triton_few import run_few, takes

ROWS = 32
"""Rows that a program takes at a time."""
PROGRAMS = 264
"""About two for each multiprocessor of an H200."""
MOST_SPLITS = 16


@triton.jit
def _load_rows(
    data_ptr, scale_ptr, stride, rows, used, column, PER_UNIT: tl.constexpr, WIDTH: tl.constexpr, FP8: tl.constexpr, DOT: tl.constexpr
):
    """Rows `rows` (int64 [N]) of a pool as DOT [N, WIDTH]; unused ones are zero."""
    unit, row = rows // PER_UNIT, rows % PER_UNIT
    if FP8:
        base = data_ptr + unit * stride + row * 576
        is_code = (column < 448)[None, :]
        codes = tl.load(base[:, None] + column[None, :], mask=used[:, None] & is_code, other=0)
        exponent = tl.load(scale_ptr + (unit * stride + row * 8)[:, None] + (column // 64)[None, :], mask=used[:, None] & is_code, other=0)
        power = (exponent.to(tl.int32) << 23).to(tl.float32, bitcast=True)
        rope = (base + 448).to(tl.pointer_type(tl.bfloat16))
        tail = tl.load(rope[:, None] + (column - 448)[None, :], mask=used[:, None] & (column >= 448)[None, :], other=0.0)
        values = tl.where(is_code, codes.to(tl.float8e4nv, bitcast=True).to(tl.float32) * power, tail.to(tl.float32))
    else:
        base = (data_ptr + unit * stride).to(tl.pointer_type(tl.bfloat16)) + row * WIDTH
        values = tl.load(base[:, None] + column[None, :], mask=used[:, None], other=0.0).to(tl.float32)
    return values.to(DOT)


@triton.jit
def _attend(
    q, top, total, acc, data_ptr, scale_ptr, stride, rows_ptr, num_rows, first, step, column, scale,
    PER_UNIT: tl.constexpr, WIDTH: tl.constexpr, FP8: tl.constexpr, DOT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Take rows [first, num_rows) of a list, ROWS at a time with a stride of `step`, into a running softmax."""
    place = tl.arange(0, ROWS)
    for start in range(first, num_rows, step):
        rows = tl.load(rows_ptr + start + place, mask=start + place < num_rows, other=-1).to(tl.int64)
        used = rows >= 0
        kv = _load_rows(data_ptr, scale_ptr, stride, tl.maximum(rows, 0), used, column, PER_UNIT, WIDTH, FP8, DOT)
        scores = tl.dot(q, tl.trans(kv), input_precision="ieee") * scale
        scores = tl.where(used[None, :], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        keep = tl.exp(top - higher)
        weight = tl.exp(scores - higher[:, None])
        total = total * keep + tl.sum(weight, 1)
        acc = acc * keep[:, None] + tl.dot(weight.to(DOT), kv, input_precision="ieee")
        top = higher
    return top, total, acc


@triton.jit
def sparse_attn_decode_kernel(
    q_ptr, window_ptr, window_scale_ptr, window_stride, window_rows_ptr, num_window,
    entries_ptr, entries_scale_ptr, entries_stride, entry_rows_ptr, entry_row_stride, num_entries_ptr,
    partial_ptr, stats_ptr, num_heads, scale,
    WINDOW_PER_UNIT: tl.constexpr, ENTRIES_PER_UNIT: tl.constexpr, WIDTH: tl.constexpr, FP8: tl.constexpr, HEADS: tl.constexpr,
    ROWS: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Program (s, block of heads, split): acc fp32 [HEADS, WIDTH] to partial [S, splits, H, WIDTH]; maximum and sum to stats [.., 2, H]."""
    sequence, split, splits = tl.program_id(0).to(tl.int64), tl.program_id(2), tl.num_programs(2)
    head, column = tl.program_id(1) * HEADS + tl.arange(0, HEADS), tl.arange(0, WIDTH)
    real = head < num_heads
    q = tl.load(q_ptr + (sequence * num_heads + head)[:, None] * WIDTH + column[None, :], mask=real[:, None], other=0.0)
    q = q.to(tl.float32).to(DOT)
    # A finite floor: a split without rows must not make NaN of -inf - -inf.
    top, total = tl.full([HEADS], -1e30, tl.float32), tl.zeros([HEADS], tl.float32)
    acc = tl.zeros([HEADS, WIDTH], tl.float32)
    first, step = split * ROWS, splits * ROWS
    top, total, acc = _attend(
        q, top, total, acc, window_ptr, window_scale_ptr, window_stride, window_rows_ptr + sequence * num_window, num_window, first, step,
        column, scale, WINDOW_PER_UNIT, WIDTH, FP8, DOT, ROWS,
    )  # fmt: skip
    top, total, acc = _attend(
        q, top, total, acc, entries_ptr, entries_scale_ptr, entries_stride, entry_rows_ptr + sequence * entry_row_stride,
        tl.load(num_entries_ptr + sequence), first, step, column, scale, ENTRIES_PER_UNIT, WIDTH, FP8, DOT, ROWS,
    )  # fmt: skip
    out = (sequence * splits + split) * num_heads + head
    tl.store(partial_ptr + out[:, None] * WIDTH + column[None, :], acc, mask=real[:, None])
    stats = stats_ptr + (sequence * splits + split) * 2 * num_heads + head
    tl.store(stats, top, mask=real)
    tl.store(stats + num_heads, total, mask=real)


@triton.jit
def combine_kernel(partial_ptr, stats_ptr, sink_ptr, out_ptr, num_heads, splits, WIDTH: tl.constexpr):
    """Program (s, head): the splits' results, and the sink, in one softmax."""
    sequence, head, column = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, WIDTH)
    top = tl.load(sink_ptr + head)
    total, acc = tl.full([], 1.0, tl.float32), tl.zeros([WIDTH], tl.float32)
    for split in range(splits):
        place = sequence * splits + split
        other = tl.load(stats_ptr + place * 2 * num_heads + head)
        higher = tl.maximum(top, other)
        keep, add = tl.exp(top - higher), tl.exp(other - higher)
        total = total * keep + tl.load(stats_ptr + (place * 2 + 1) * num_heads + head) * add
        acc = acc * keep + tl.load(partial_ptr + (place * num_heads + head) * WIDTH + column) * add
        top = higher
    tl.store(out_ptr + (sequence * num_heads + head) * WIDTH + column, acc / total)


def run(
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
    sequences, heads, width = q.shape
    out = torch.empty_like(q)
    if not sequences:
        return out
    if takes(sequences, entry_rows.shape[1]):
        return run_few(q.contiguous(), window, window_rows.contiguous(), entries, entry_rows, num_entries, sink, scale, cos, sin, memo)
    if entries is None or not entry_rows.shape[1]:
        entries, num_entries = window, torch.zeros_like(num_entries)
    block = max(16, min(64, triton.next_power_of_2(heads)))
    blocks = triton.cdiv(heads, block)
    most = triton.cdiv(window_rows.shape[1] + entry_rows.shape[1], ROWS)
    splits = max(1, min(MOST_SPLITS, most, PROGRAMS // (sequences * blocks)))
    partial = torch.empty(sequences, splits, heads, width, device=q.device)
    stats = torch.empty(sequences, splits, 2, heads, device=q.device)
    sparse_attn_decode_kernel[(sequences, blocks, splits)](
        q.contiguous(), window.data, window.scale, window.data.stride(0), window_rows.contiguous(), window_rows.shape[1],
        entries.data, entries.scale, entries.data.stride(0), entry_rows, entry_rows.stride(0), num_entries,
        partial, stats, heads, scale,
        WINDOW_PER_UNIT=window.data.shape[1], ENTRIES_PER_UNIT=entries.data.shape[1], WIDTH=width,
        FP8=isinstance(window.form, Fp8KvRows), HEADS=block, ROWS=ROWS, DOT=tl.bfloat16 if q.is_cuda else tl.float32, num_warps=8,
    )  # fmt: skip
    combine_kernel[(sequences, heads)](partial, stats, sink, out, heads, splits, WIDTH=width, num_warps=4)
    return output_derotate(out, cos, sin)


_KERNEL = {
    "q_ptr": "*bf16", "window_ptr": "*u8", "window_scale_ptr": "*u8", "window_stride": "i64", "window_rows_ptr": "*i32",
    "num_window": "i32", "entries_ptr": "*u8", "entries_scale_ptr": "*u8", "entries_stride": "i64", "entry_rows_ptr": "*i32",
    "entry_row_stride": "i64", "num_entries_ptr": "*i32", "partial_ptr": "*fp32", "stats_ptr": "*fp32", "num_heads": "i32", "scale": "fp32",
}  # fmt: skip
_COMBINE = {"partial_ptr": "*fp32", "stats_ptr": "*fp32", "sink_ptr": "*fp32", "out_ptr": "*bf16", "num_heads": "i32", "splits": "i32"}
AOT = [
    (
        sparse_attn_decode_kernel,
        _KERNEL,
        {"WINDOW_PER_UNIT": 128, "ENTRIES_PER_UNIT": per_unit, "WIDTH": 512, "FP8": fp8, "HEADS": 64, "ROWS": ROWS, "DOT": tl.bfloat16},
        {"num_warps": 8},
    )
    for per_unit, fp8 in ((64, True), (2, True), (64, False))
] + [(combine_kernel, _COMBINE, {"WIDTH": 512}, {"num_warps": 4})]

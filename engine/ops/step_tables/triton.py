"""step_tables in one launch: a program a token and some of its dense entries; the first one of a token does the rest."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.batch import TokenPlaces
from engine.cache.layout import C128_ROWS_PER_PAGE, WINDOW_ROWS
from engine.ops.step_tables import StepTables

BLOCK = 512
"""Dense entries of a program."""
ALIGNMENT = 16
"""Tokens between vectors that share an allocation are a multiple: whatever the step, each starts where kernels that read it take it to."""
WINDOW = tl.constexpr(WINDOW_ROWS)
PER_PAGE = tl.constexpr(C128_ROWS_PER_PAGE)


@triton.jit
def _turn(position, frequencies, angles_ptr, at, stride):
    """Cosine, and a stride behind it sine, of the fp32 product, in float64."""
    angle = (position.to(tl.float32) * frequencies).to(tl.float64)
    tl.store(angles_ptr + at, tl.cos(angle).to(tl.float32))
    tl.store(angles_ptr + stride + at, tl.sin(angle).to(tl.float32))


@triton.jit(do_not_specialize=["num_tokens", "vector_stride", "table_stride", "count", "top_k"])
def step_tables_kernel(
    positions_ptr, sequences_ptr, slots_ptr, table_ptr, main_ptr, compressed_ptr, angles_ptr, longs_ptr, counts_ptr, dense_ptr,
    dense_rows_ptr, window_rows_ptr, num_tokens, vector_stride, table_stride, count, top_k,
    PAIRS: tl.constexpr, BLOCK: tl.constexpr, DECODE: tl.constexpr,
):  # fmt: skip
    """angles: fp32 [8, T, PAIRS]; longs: int64 [3, vector_stride]; counts: int32 [3, vector_stride]; all in the order of StepTables."""
    token = tl.program_id(0).to(tl.int64)
    position, sequence = tl.load(positions_ptr + token), tl.load(sequences_ptr + token)
    visible4, visible128 = (position + 1) >> 2, (position + 1) >> 7
    entry = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    sees = entry < visible128
    tl.store(dense_ptr + token * count + entry, tl.where(sees, entry, -1), mask=entry < count)
    if DECODE:
        page = tl.load(table_ptr + sequence * table_stride + entry // PER_PAGE, mask=sees & (entry < count), other=0)
        row = tl.where(sees, page * PER_PAGE + entry % PER_PAGE, -1)
        tl.store(dense_rows_ptr + token * count + entry, row, mask=entry < count)
    if tl.program_id(1) == 0:
        pair = tl.arange(0, PAIRS)
        at, stride = token * PAIRS + pair, num_tokens.to(tl.int64) * PAIRS
        compressed = tl.load(compressed_ptr + pair)
        _turn(position, tl.load(main_ptr + pair), angles_ptr, at, stride)
        _turn(position, compressed, angles_ptr + 2 * stride, at, stride)
        _turn(position >> 2 << 2, compressed, angles_ptr + 4 * stride, at, stride)
        _turn(position >> 7 << 7, compressed, angles_ptr + 6 * stride, at, stride)
        slot = tl.load(slots_ptr + token)
        later = tl.load(sequences_ptr + token + WINDOW, mask=token + WINDOW < num_tokens, other=-1)
        tl.store(longs_ptr + token, visible4)
        tl.store(longs_ptr + vector_stride + token, tl.where((later != sequence) & (position >= 0), slot, -1))
        tl.store(longs_ptr + 2 * vector_stride + token, position & (WINDOW - 1))
        tl.store(counts_ptr + token, 0)
        tl.store(counts_ptr + vector_stride + token, tl.minimum(visible4, top_k).to(tl.int32))
        tl.store(counts_ptr + 2 * vector_stride + token, visible128.to(tl.int32))
        ring = tl.arange(0, WINDOW)
        tl.store(window_rows_ptr + token * WINDOW + ring, tl.where(ring <= position, slot * WINDOW + ring, -1).to(tl.int32))


def run(places: TokenPlaces, main: torch.Tensor, compressed: torch.Tensor, top_k: int, longest: int) -> StepTables:
    """As the reference; half the rope width a power of two."""
    tokens, count, device, pairs = len(places.positions_T), longest // 128, main.device, len(main)
    assert pairs & (pairs - 1) == 0, f"{pairs} pairs"
    vectors = places.positions_T, places.sequences_T, places.slots_T
    assert all(vector.is_contiguous() for vector in vectors), [vector.stride() for vector in vectors]
    angles = torch.empty(8, tokens, pairs, dtype=torch.float32, device=device)
    stride = -(-tokens // ALIGNMENT) * ALIGNMENT
    longs = torch.empty(3, stride, dtype=torch.int64, device=device)
    counts = torch.empty(3, stride, dtype=torch.int32, device=device)
    dense = torch.empty(tokens, count, dtype=torch.int32, device=device)
    dense_rows = torch.empty(tokens, count if places.is_decode else 0, dtype=torch.int32, device=device)
    window_rows = torch.empty(tokens, WINDOW_ROWS, dtype=torch.int32, device=device)
    if tokens:
        step_tables_kernel[(tokens, max(1, triton.cdiv(count, BLOCK)))](
            *vectors, places.page_table_SP, main, compressed, angles, longs, counts, dense, dense_rows, window_rows,
            tokens, stride, places.page_table_SP.stride(0), count, top_k,
            PAIRS=pairs, BLOCK=BLOCK, DECODE=places.is_decode, num_warps=4,
        )  # fmt: skip
    return StepTables(*angles, *longs[:, :tokens], *counts[:, :tokens], dense, dense_rows, window_rows)


_TYPES = dict.fromkeys(("positions_ptr", "sequences_ptr", "slots_ptr", "longs_ptr"), "*i64")
_TYPES |= dict.fromkeys(("table_ptr", "counts_ptr", "dense_ptr", "dense_rows_ptr", "window_rows_ptr"), "*i32")
_TYPES |= dict.fromkeys(("main_ptr", "compressed_ptr", "angles_ptr"), "*fp32")
_TYPES |= dict.fromkeys(("num_tokens", "vector_stride", "table_stride", "count", "top_k"), "i32")
AOT = [(step_tables_kernel, _TYPES, {"PAIRS": 32, "BLOCK": BLOCK, "DECODE": decode}, {"num_warps": 4}) for decode in (True, False)]

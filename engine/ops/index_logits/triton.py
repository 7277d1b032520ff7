"""Index scores straight from the pages, with keys as the long side of the matrix product: a head's sum stays within a thread quad.

Decode: a program takes one query and a run of pages. Prefill: a program keeps 128 keys and takes the queries of its tile one after
the other, sequence by sequence, skipping those that see none of its keys.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.batch import TokenPlaces
from engine.cache.arena import RowPool
from engine.cache.rows import Fp4IndexRows, Fp8IndexRows

ROWS = 64
"""Keys in a page."""
RATIO = 4
PROGRAMS = 2112
"""Programs of a decode launch to aim at: 16 for each multiprocessor of an H200."""
QUERIES, KEYS = 64, 128
"""Tile of a prefill program."""


@triton.jit
def _keys(data_ptr, scale_ptr, page, row, inside, data_stride, scale_stride, BLOCK: tl.constexpr, WIDTH: tl.constexpr, FORM: tl.constexpr):
    """Keys [BLOCK, WIDTH] as the matrix product takes them, and factors fp32 [BLOCK] of their scores."""
    factor = tl.full([BLOCK], 1.0, tl.float32)
    if FORM == "fp4":
        byte, group = tl.arange(0, WIDTH // 2), tl.arange(0, WIDTH // 32)
        at = page[:, None] * data_stride + row[:, None] * (WIDTH // 2) + byte[None, :]
        pairs = tl.load(data_ptr + at, mask=inside[:, None], other=0)
        at = page[:, None] * scale_stride + row[:, None] * (WIDTH // 32) + group[None, :]
        exponent = tl.load(scale_ptr + at, mask=inside[:, None], other=0)
        scale = (exponent.to(tl.int32) << 23).to(tl.float32, bitcast=True)
        values = tl.reshape(tl.join(_e2m1(pairs & 15), _e2m1(pairs >> 4)), [BLOCK, WIDTH // 32, 32]) * scale[:, :, None]
        keys = tl.reshape(values, [BLOCK, WIDTH]).to(tl.bfloat16)
    else:
        channel = tl.arange(0, WIDTH)
        at = page[:, None] * data_stride + row[:, None] * WIDTH + channel[None, :]
        keys = tl.load(data_ptr + at, mask=inside[:, None], other=0.0)
        if FORM == "fp8":
            factor = tl.load(scale_ptr + page * scale_stride + row, mask=inside, other=0.0)
    return keys, factor


@triton.jit
def _e2m1(code):
    """fp32 value of a 4-bit code."""
    magnitude = (code & 7).to(tl.float32)
    value = tl.where(magnitude < 4, magnitude * 0.5, tl.where(magnitude < 6, magnitude - 2, magnitude * 2 - 8))
    return tl.where(code >= 8, -value, value)


@triton.jit
def _score(keys, factor, query, weights, FORM: tl.constexpr):
    """fp32 [N]. query: [heads, WIDTH]."""
    if FORM == "fp32":
        dots = tl.dot(keys, tl.trans(query), input_precision="ieee")
    else:
        dots = tl.dot(keys, tl.trans(query))
    return tl.sum(tl.maximum(dots, 0.0) * weights[None, :], 1) * factor


@triton.jit(do_not_specialize=["table_stride", "num_entries"])
def decode_logits_kernel(
    q_ptr,
    weights_ptr,
    data_ptr,
    scale_ptr,
    positions_ptr,
    sequences_ptr,
    table_ptr,
    scores_ptr,
    data_stride,
    scale_stride,
    table_stride,
    scores_stride,
    num_entries,
    PAGES: tl.constexpr,
    BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    FORM: tl.constexpr,
    STAGES: tl.constexpr,
):
    token = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * PAGES * 64
    visible = tl.minimum((tl.load(positions_ptr + token) + 1) // 4, num_entries).to(tl.int32)
    if first < visible:
        head, channel = tl.arange(0, HEADS), tl.arange(0, WIDTH)
        query = tl.load(q_ptr + (token * HEADS + head[:, None]) * WIDTH + channel[None, :])
        weights = tl.load(weights_ptr + token * HEADS + head)
        table_ptr += tl.load(sequences_ptr + token) * table_stride
        for start in tl.range(first, tl.minimum(first + PAGES * 64, visible), BLOCK, num_stages=STAGES):
            entry = start + tl.arange(0, BLOCK)
            inside = entry < visible
            page = tl.load(table_ptr + entry // 64, mask=inside, other=0).to(tl.int64)
            keys, factor = _keys(data_ptr, scale_ptr, page, entry % 64, inside, data_stride, scale_stride, BLOCK, WIDTH, FORM)
            tl.store(scores_ptr + token * scores_stride + entry, _score(keys, factor, query, weights, FORM), mask=inside)


@triton.jit(do_not_specialize=["table_stride", "num_entries", "num_tokens"])
def prefill_logits_kernel(
    q_ptr,
    weights_ptr,
    data_ptr,
    scale_ptr,
    positions_ptr,
    sequences_ptr,
    table_ptr,
    scores_ptr,
    data_stride,
    scale_stride,
    table_stride,
    scores_stride,
    num_entries,
    num_tokens,
    QUERIES: tl.constexpr,
    BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    FORM: tl.constexpr,
    STAGES: tl.constexpr,
):
    tile = tl.program_id(1) * QUERIES
    start = tl.program_id(0) * BLOCK
    token = tile + tl.arange(0, QUERIES)
    there = token < num_tokens
    sequence = tl.load(sequences_ptr + token, mask=there, other=2147483647)
    visible = tl.minimum((tl.load(positions_ptr + token, mask=there, other=-1) + 1) // 4, num_entries)
    sees = visible > start
    if tl.max(sees.to(tl.int32), 0) > 0:
        entry = start + tl.arange(0, BLOCK)
        head, channel = tl.arange(0, HEADS), tl.arange(0, WIDTH)
        lowest = tl.min(tl.where(sees, sequence, 2147483647), 0).to(tl.int32)
        highest = tl.max(tl.where(sees, sequence, -1), 0).to(tl.int32)
        for number in range(lowest, highest + 1):
            # Within a chunk positions grow: the queries that see something are its last ones.
            end = tile + tl.sum((sequence <= number).to(tl.int32), 0)
            begin = end - tl.sum((sees & (sequence == number)).to(tl.int32), 0)
            most = tl.max(tl.where(sequence == number, visible, 0), 0)
            inside = entry < most
            page = tl.load(table_ptr + number * table_stride + entry // 64, mask=inside, other=0).to(tl.int64)
            keys, factor = _keys(data_ptr, scale_ptr, page, entry % 64, inside, data_stride, scale_stride, BLOCK, WIDTH, FORM)
            for row in tl.range(begin, end, num_stages=STAGES):
                query = tl.load(q_ptr + (row * HEADS + head[:, None]) * WIDTH + channel[None, :])
                weights = tl.load(weights_ptr + row * HEADS + head)
                score = _score(keys, factor, query, weights, FORM)
                tl.store(scores_ptr + row * scores_stride.to(tl.int64) + entry, score, mask=inside)


def form_of(keys: RowPool) -> str:
    """ "fp8" and "fp4" have scales; "bf16" and "fp32" are plain."""
    if isinstance(keys.form, Fp8IndexRows):
        return "fp8"
    if isinstance(keys.form, Fp4IndexRows):
        return "fp4"
    return "bf16" if keys.form.dtype == torch.bfloat16 else "fp32"


def empty_scores(tokens: int, num_entries: int, device: torch.device) -> torch.Tensor:
    """[tokens, num_entries], rows aligned for 16-byte loads and padded to whole blocks."""
    return torch.empty(tokens, -(-num_entries // 256) * 256, dtype=torch.float32, device=device)[:, :num_entries]


def run(q: torch.Tensor, weights: torch.Tensor, keys: RowPool, places: TokenPlaces, num_entries: int) -> torch.Tensor:
    """As the reference, for every index format; pages of 64 keys."""
    tokens, heads, width = q.shape
    assert keys.data.shape[1] == ROWS and weights.dtype == torch.float32, f"{keys.data.shape} {weights.dtype}"
    scores = empty_scores(tokens, num_entries, q.device)
    if not scores.numel():
        return scores
    form = form_of(keys)
    data, scale = keys.data, keys.scale
    if form != "fp4":
        data = data.view({"fp8": torch.float8_e4m3fn, "bf16": torch.bfloat16, "fp32": torch.float32}[form])
        scale = scale.view(torch.float32) if form == "fp8" else data
    arguments = (q.contiguous(), weights.contiguous(), data, scale, places.positions_T, places.sequences_T, places.page_table_SP, scores)
    strides = (data.stride(0), scale.stride(0), places.page_table_SP.stride(0), scores.stride(0))
    if places.is_decode:
        pages = min(64, max(4, triton.next_power_of_2(tokens * triton.cdiv(num_entries, ROWS) // PROGRAMS)))
        constants = {"PAGES": pages, "BLOCK": 128, "HEADS": heads, "WIDTH": width, "FORM": form, "STAGES": 3}
        decode_logits_kernel[(triton.cdiv(num_entries, pages * ROWS), tokens)](*arguments, *strides, num_entries, **constants)
    else:
        constants = {"QUERIES": QUERIES, "BLOCK": KEYS, "HEADS": heads, "WIDTH": width, "FORM": form, "STAGES": 3}
        grid = (triton.cdiv(num_entries, KEYS), triton.cdiv(tokens, QUERIES))
        prefill_logits_kernel[grid](*arguments, *strides, num_entries, tokens, **constants)
    return scores


_POINTERS = {"weights_ptr": "*fp32", "positions_ptr": "*i64", "sequences_ptr": "*i64", "table_ptr": "*i32", "scores_ptr": "*fp32"}
_STRIDES = {"data_stride": "i32:16", "scale_stride": "i32:16", "table_stride": "i32", "scores_stride": "i32:16", "num_entries": "i32"}
_TYPES = {"fp8": ("*fp8e4nv", "*fp8e4nv", "*fp32"), "fp4": ("*bf16", "*u8", "*u8"), "bf16": ("*bf16", "*bf16", "*bf16")}


def _signature(form: str) -> dict[str, str]:
    q, data, scale = _TYPES[form]
    return {"q_ptr": q, "data_ptr": data, "scale_ptr": scale, **_POINTERS, **_STRIDES}


AOT = [
    (
        decode_logits_kernel,
        _signature(form),
        {"PAGES": 4, "BLOCK": 128, "HEADS": 64, "WIDTH": 128, "FORM": form, "STAGES": 3},
        {"num_warps": 4},
    )
    for form in _TYPES
] + [
    (
        prefill_logits_kernel,
        {**_signature(form), "num_tokens": "i32"},
        {"QUERIES": QUERIES, "BLOCK": KEYS, "HEADS": 64, "WIDTH": 128, "FORM": form, "STAGES": 3},
        {"num_warps": 4},
    )
    for form in _TYPES
]

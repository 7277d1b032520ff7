"""Index scores straight from the pages, with keys as the long side of the matrix product: a head's sum stays within a thread quad.

Decode: a program takes one query and a run of pages, which the copy engine brings; runs are dealt out by what the queries see, on the
device, so that neither a wide bucket nor one long sequence leaves programs without work. Prefill: a program keeps 128 keys and takes the
queries of its tile one after the other, sequence by sequence, skipping those that see none of its keys.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from engine.batch import TokenPlaces
from engine.cache.arena import RowPool
from engine.cache.rows import Fp4IndexRows, Fp8IndexRows

ROWS = 64
"""Keys in a page."""
RATIO = 4
PROGRAMS = 6 if triton.knobs.runtime.interpret else 528
"""Programs of a decode launch with work, at most: as many as an H200 runs at once, so that there is one wave. Interpreted few, so that
small cases have runs of several pages."""
STAGES = 5
"""Pages on their way to a decode program."""
QUERIES, KEYS = 64, 128
"""Tile of a prefill program."""


@triton.jit
def _keys(raw, exponent, FORM: tl.constexpr, N: tl.constexpr, WIDTH: tl.constexpr):
    """Keys [N, WIDTH] as the matrix product takes them, from rows as they are stored (fp4: uint8 [N, WIDTH / 2] and exponents uint8
    [N, WIDTH / 32])."""
    if FORM == "fp4":
        codes = tl.reshape(tl.join(raw & 15, raw >> 4), [N, WIDTH // 32, 32]).to(tl.int32)
        magnitude = codes & 7
        # Bits of bf16: e2m1's exponent and mantissa, above the group's exponent; 0.5 is the only value that is not normal.
        bits = (magnitude << 6) + ((exponent.to(tl.int32) - 1) << 7)[:, :, None] - tl.where(magnitude == 1, 64, 0)
        bits = tl.where(magnitude == 0, 0, bits) | ((codes & 8) << 12)
        raw = tl.reshape(bits.to(tl.uint16).to(tl.bfloat16, bitcast=True), [N, WIDTH])
    return raw


@triton.jit
def _score(keys, query, weights, FORM: tl.constexpr):
    """fp32 [N]. query: [heads, WIDTH]."""
    if FORM == "fp32":
        dots = tl.dot(keys, tl.trans(query), input_precision="ieee")
    else:
        dots = tl.dot(keys, tl.trans(query))
    return tl.sum(tl.maximum(dots, 0.0) * weights[None, :], 1)


@triton.jit
def _run_of_pages(positions_ptr, num_entries, num_tokens, num_programs, num_runs, PADDED_TOKENS: tl.constexpr):
    """(query, first page, end) of this program; a query of num_tokens or more: there is nothing to do. The pages of all queries make
    num_programs runs of equal length if they divide so, else num_runs at most, and one more a query; then those of one query are made
    equally long, but for the last."""
    every = tl.arange(0, PADDED_TOKENS)
    position = tl.load(positions_ptr + every, mask=every < num_tokens, other=-1)
    pages = ((tl.minimum((position + 1) // 4, num_entries) + 63) // 64).to(tl.int32)
    total = tl.sum(pages, 0)
    longest = tl.maximum((total + num_programs - 1) // num_programs, 1)
    fits = tl.sum((pages + longest - 1) // longest, 0) <= num_programs
    longest = tl.where(fits, longest, (total + num_runs - 1) // num_runs)
    runs = (pages + longest - 1) // longest
    ends = tl.cumsum(runs, 0)
    token = tl.sum((ends <= tl.program_id(0)).to(tl.int32), 0)
    own_pages = tl.sum(tl.where(every == token, pages, 0), 0)
    own_runs = tl.maximum(tl.sum(tl.where(every == token, runs, 0), 0), 1)
    length = (own_pages + own_runs - 1) // own_runs
    first = (tl.program_id(0) - tl.sum(tl.where(every < token, runs, 0), 0)) * length
    return token, first, tl.minimum(first + length, own_pages)


@triton.jit(do_not_specialize=["table_stride", "num_entries", "num_tokens", "num_programs", "num_runs"])
def decode_logits_kernel(
    data, q_ptr, weights_ptr, scale_ptr, positions_ptr, sequences_ptr, table_ptr, scores_ptr,
    scale_stride, table_stride, scores_stride, num_entries, num_tokens, num_programs, num_runs,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, FORM: tl.constexpr, STAGES: tl.constexpr, PADDED_TOKENS: tl.constexpr,
):  # fmt: skip
    """data: descriptor of the pages' rows, a block of which is a page."""
    number_of, first, end = _run_of_pages(positions_ptr, num_entries, num_tokens, num_programs, num_runs, PADDED_TOKENS)
    if number_of < num_tokens:
        token = number_of.to(tl.int64)
        visible = tl.minimum((tl.load(positions_ptr + token) + 1) // 4, num_entries).to(tl.int32)
        head, channel, row = tl.arange(0, HEADS), tl.arange(0, WIDTH), tl.arange(0, 64)
        query = tl.load(q_ptr + (token * HEADS + head[:, None]) * WIDTH + channel[None, :])
        weights = tl.load(weights_ptr + token * HEADS + head)
        table_ptr += tl.load(sequences_ptr + token) * table_stride
        scores_ptr += token * scores_stride
        for number in tl.range(first, end, num_stages=STAGES):
            page = tl.load(table_ptr + number)
            raw = tl.reshape(data.load([page, 0, 0]), [64, data.block_shape[2]])
            scale = scale_ptr + page.to(tl.int64) * scale_stride
            if FORM == "fp4":
                group = tl.arange(0, WIDTH // 32)
                keys = _keys(raw, tl.load(scale + row[:, None] * (WIDTH // 32) + group[None, :]), FORM, 64, WIDTH)
            else:
                keys = raw
            score = _score(keys, query, weights, FORM)
            if FORM == "fp8":
                score *= tl.load(scale + row)
            entry = number * 64 + row
            tl.store(scores_ptr + entry, score, mask=entry < visible)


@triton.jit(do_not_specialize=["table_stride", "num_entries", "num_tokens"])
def prefill_logits_kernel(
    data_ptr, q_ptr, weights_ptr, scale_ptr, positions_ptr, sequences_ptr, table_ptr, scores_ptr,
    data_stride, scale_stride, table_stride, scores_stride, num_entries, num_tokens,
    QUERIES: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr, ELEMENTS: tl.constexpr,
    FORM: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
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
            at = (page * data_stride + entry % 64 * ELEMENTS)[:, None] + tl.arange(0, ELEMENTS)[None, :]
            keys = tl.load(data_ptr + at, mask=inside[:, None])
            factor = tl.full([BLOCK], 1.0, tl.float32)
            if FORM == "fp4":
                group = tl.arange(0, WIDTH // 32)
                at = (page * scale_stride + entry % 64 * (WIDTH // 32))[:, None] + group[None, :]
                keys = _keys(keys, tl.load(scale_ptr + at, mask=inside[:, None], other=1), FORM, BLOCK, WIDTH)
            elif FORM == "fp8":
                factor = tl.load(scale_ptr + page * scale_stride + entry % 64, mask=inside, other=0.0)
            for row in tl.range(begin, end, num_stages=STAGES):
                query = tl.load(q_ptr + (row * HEADS + head[:, None]) * WIDTH + channel[None, :])
                weights = tl.load(weights_ptr + row * HEADS + head)
                score = _score(keys, query, weights, FORM) * factor
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
    form, data, scale = form_of(keys), keys.data, keys.scale
    if form != "fp4":
        data = data.view({"fp8": torch.float8_e4m3fn, "bf16": torch.bfloat16, "fp32": torch.float32}[form])
        scale = scale.view(torch.float32) if form == "fp8" else data
    table = places.page_table_SP
    arguments = (q.contiguous(), weights.contiguous(), scale, places.positions_T, places.sequences_T, table, scores)
    if places.is_decode:
        num_runs = max(PROGRAMS - tokens, PROGRAMS // 4)
        descriptor = TensorDescriptor(data, list(data.shape), list(data.stride()), [1, ROWS, data.shape[2]])
        decode_logits_kernel[(min(max(PROGRAMS, num_runs + tokens), tokens * triton.cdiv(num_entries, ROWS)),)](
            descriptor, *arguments, scale.stride(0), table.stride(0), scores.stride(0), num_entries, tokens, PROGRAMS, num_runs,
            HEADS=heads, WIDTH=width, FORM=form, STAGES=STAGES, PADDED_TOKENS=max(16, triton.next_power_of_2(tokens)),
        )  # fmt: skip
    else:
        prefill_logits_kernel[(triton.cdiv(num_entries, KEYS), triton.cdiv(tokens, QUERIES))](
            data, *arguments, data.stride(0), scale.stride(0), table.stride(0), scores.stride(0), num_entries, tokens,
            QUERIES=QUERIES, BLOCK=KEYS, HEADS=heads, WIDTH=width, ELEMENTS=data.shape[2], FORM=form, STAGES=3,
        )  # fmt: skip
    return scores


_TYPES = {"weights_ptr": "*fp32", "positions_ptr": "*i64", "sequences_ptr": "*i64", "table_ptr": "*i32", "scores_ptr": "*fp32"}
_TYPES |= {"scale_stride": "i32:16", "table_stride": "i32", "scores_stride": "i32:16", "num_entries": "i32"}
_NUMBERS = {"num_tokens": "i32", "num_programs": "i32", "num_runs": "i32"}
_FORMS = (("fp8", "fp8e4nv", "fp8e4nv", "fp32", 128), ("fp4", "bf16", "u8", "u8", 64), ("bf16", "bf16", "bf16", "bf16", 128))
AOT = [
    (
        decode_logits_kernel,
        _TYPES | {"data": f"tensordesc<{data}[1, 64, {elements}]>", "q_ptr": f"*{q}", "scale_ptr": f"*{scale}"} | _NUMBERS,
        {"HEADS": 64, "WIDTH": 128, "FORM": form, "STAGES": STAGES, "PADDED_TOKENS": tokens},
        {"num_warps": 4},
    )
    for tokens, (form, q, data, scale, elements) in zip((256, 16, 16), _FORMS, strict=True)
] + [
    (
        prefill_logits_kernel,
        _TYPES | {"data_ptr": f"*{data}", "q_ptr": f"*{q}", "scale_ptr": f"*{scale}", "data_stride": "i32:16", "num_tokens": "i32"},
        {"QUERIES": QUERIES, "BLOCK": KEYS, "HEADS": 64, "WIDTH": 128, "ELEMENTS": elements, "FORM": form, "STAGES": 3},
        {"num_warps": 4},
    )
    for form, q, data, scale, elements in _FORMS
]

"""Kernels of the routed experts that move rows: which pair goes to which expert, and the sum over a token's experts."""

from __future__ import annotations

import triton
import triton.language as tl

from engine.ops.triton_rounding import quantize

BLOCK = tl.constexpr(128)


@triton.jit(do_not_specialize=["num_pairs", "max_blocks"])
def moe_route_kernel(
    ids_ptr,
    x_ptr,
    codes_ptr,
    scales_ptr,
    pairs_ptr,
    block_expert_ptr,
    num_pairs,
    num_experts,
    max_blocks,
    width,
    padded_width,
    PADDED_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    CHUNK: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Programs below num_experts list the (token, place) pairs of an expert, in order, in blocks of BLOCK_M with -1 behind the
    last; the others quantise 128 * GROUPS channels of a token. Each lister counts all pairs itself: no launch to count before."""
    program = tl.program_id(0)
    if program < num_experts:
        experts = tl.arange(0, PADDED_E)
        counts = tl.zeros([PADDED_E], tl.int32)
        for start in range(0, num_pairs, CHUNK):
            pair = start + tl.arange(0, CHUNK)
            local = tl.load(ids_ptr + pair, mask=pair < num_pairs, other=-1).to(tl.int32)
            local = tl.where((pair < num_pairs) & (local >= 0) & (local < num_experts), local, PADDED_E - 1)
            counts += tl.histogram(local, PADDED_E)
        counts = tl.where(experts < num_experts, counts, 0)
        blocks = (counts + BLOCK_M - 1) // BLOCK_M
        first_block = tl.sum(tl.where(experts < program, blocks, 0), 0)
        own_blocks = tl.sum(tl.where(experts == program, blocks, 0), 0)
        for block in range(own_blocks):
            tl.store(block_expert_ptr + first_block + block, program)
        base = first_block * BLOCK_M
        found = 0
        if own_blocks > 0:
            for start in range(0, num_pairs, CHUNK):
                pair = start + tl.arange(0, CHUNK)
                mine = tl.load(ids_ptr + pair, mask=pair < num_pairs, other=-1).to(tl.int32) == program
                mine = mine & (pair < num_pairs)
                rank = tl.cumsum(mine.to(tl.int32), 0) - 1
                tl.store(pairs_ptr + base + found + rank, pair, mask=mine)
                found += tl.sum(mine.to(tl.int32), 0)
            place = found + tl.arange(0, BLOCK_M)
            tl.store(pairs_ptr + base + place, tl.full([BLOCK_M], -1, tl.int32), mask=place < own_blocks * BLOCK_M)
        if program == 0:
            for block in range(tl.sum(blocks, 0), max_blocks):
                tl.store(block_expert_ptr + block, -1)
    else:
        groups_per_row = padded_width // BLOCK
        pieces = tl.cdiv(groups_per_row, GROUPS)
        token = ((program - num_experts) // pieces).to(tl.int64)
        group = (program - num_experts) % pieces * GROUPS + tl.arange(0, GROUPS)
        channel = group[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        x = tl.load(x_ptr + token * width + channel, mask=channel < width, other=0.0).to(tl.float32)
        codes, scale = quantize(x, 1)
        tl.store(codes_ptr + token * padded_width + channel, codes, mask=channel < padded_width)
        tl.store(scales_ptr + token * groups_per_row + group[:, None], scale, mask=group[:, None] < groups_per_row)


@triton.jit
def place_of(num_blocks, num_tiles, GROUP_BLOCKS: tl.constexpr):
    """(block, tile) of this program: GROUP_BLOCKS blocks of tokens take a tile of weights after each other, then the next tile."""
    program = tl.program_id(0)
    per_group = GROUP_BLOCKS * num_tiles
    first = program // per_group * GROUP_BLOCKS
    size = tl.minimum(num_blocks - first, GROUP_BLOCKS)
    return first + program % per_group % size, program % per_group // size


@triton.jit
def moe_sum_kernel(out_ptr, ids_ptr, sum_ptr, num_experts, width, TOP_K: tl.constexpr, CHANNELS: tl.constexpr):
    """sum[token] = fp32 sum of the rows of its pairs, in order; pairs of experts that are not here count nothing."""
    token = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    total = tl.zeros([CHANNELS], tl.float32)
    for place in tl.static_range(TOP_K):
        local = tl.load(ids_ptr + token * TOP_K + place)
        here = (local >= 0) & (local < num_experts)
        row = out_ptr + (token * TOP_K + place) * width + channel
        total += tl.load(row, mask=here & (channel < width), other=0.0).to(tl.float32)
    tl.store(sum_ptr + token * width + channel, total, mask=channel < width)


_ROUTE = {"ids_ptr": "*i64", "x_ptr": "*bf16", "codes_ptr": "*fp8e4nv", "scales_ptr": "*fp32", "pairs_ptr": "*i32"}
_ROUTE |= {"block_expert_ptr": "*i32", "num_pairs": "i32", "num_experts": "i32:16", "max_blocks": "i32"}
_ROUTE |= {"width": "i32:16", "padded_width": "i32:16"}
_SUM = {"out_ptr": "*bf16", "ids_ptr": "*i64", "sum_ptr": "*fp32", "num_experts": "i32:16", "width": "i32:16"}
AOT = [
    (moe_route_kernel, _ROUTE, {"PADDED_E": 512, "BLOCK_M": 16, "CHUNK": 1024, "GROUPS": 8}, {"num_warps": 4}),
    (moe_route_kernel, _ROUTE, {"PADDED_E": 512, "BLOCK_M": 128, "CHUNK": 4096, "GROUPS": 8}, {"num_warps": 8}),
    (moe_sum_kernel, _SUM, {"TOP_K": 6, "CHANNELS": 1024}, {"num_warps": 4}),
]

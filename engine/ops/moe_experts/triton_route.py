"""Kernels of the routed experts that move rows: which pair goes to which expert, and the sum over a token's experts."""

from __future__ import annotations

import triton
import triton.language as tl

from engine.ops.triton_rounding import quantize, to_bf16

BLOCK = tl.constexpr(128)
MOST_EXPERTS = tl.constexpr(512)
MOST_BLOCKS = tl.constexpr(1 << 22)
"""In one launch: their product is what an int32 can count."""


@triton.jit
def count_pairs(ids_ptr, first, end, CHUNK: tl.constexpr):
    """Pairs first..end - 1 of the expert that this program's number is."""
    count = tl.zeros([CHUNK], tl.int32)
    for start in range(first, end, CHUNK):
        pair = start + tl.arange(0, CHUNK)
        count += (tl.load(ids_ptr + pair, mask=pair < end, other=-1) == tl.program_id(0)).to(tl.int32)
    return tl.sum(count, 0)


@triton.jit(do_not_specialize=["num_pairs", "part_pairs"])
def moe_count_kernel(ids_ptr, counts_ptr, num_pairs, part_pairs, CHUNK: tl.constexpr):
    """counts[expert, part] = pairs of it in this part of all, of `part_pairs` each."""
    start = tl.program_id(1) * part_pairs
    count = count_pairs(ids_ptr, start, tl.minimum(start + part_pairs, num_pairs), CHUNK)
    tl.store(counts_ptr + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), count)


@triton.jit
def list_pairs(ids_ptr, pairs_ptr, slots_ptr, first, end, slot, CHUNK: tl.constexpr, SLOTS: tl.constexpr):
    """Program e lists those of pairs first..end - 1 that are of expert e, in order, from `slot` on; with SLOTS each pair's slot is kept,
    too. Returns the slot behind the last."""
    for start in range(first, end, CHUNK):
        pair = start + tl.arange(0, CHUNK)
        mine = tl.load(ids_ptr + pair, mask=pair < end, other=-1) == tl.program_id(0)
        own = slot + tl.cumsum(mine.to(tl.int32), 0) - 1
        tl.store(pairs_ptr + own, pair, mask=mine)
        if SLOTS:
            tl.store(slots_ptr + pair, own, mask=mine)
        slot += tl.sum(mine.to(tl.int32), 0)
    return slot


@triton.jit
def fill_up(pairs_ptr, slot, BLOCK_M: tl.constexpr):
    """-1 from `slot` to the end of its block, if it is not the first of one."""
    place = slot + tl.arange(0, BLOCK_M)
    tl.store(pairs_ptr + place, tl.full([BLOCK_M], -1, tl.int32), mask=place < tl.cdiv(slot, BLOCK_M) * BLOCK_M)


@triton.jit
def say_expert(block_expert_ptr, expert, first_block, end_block):
    """block_expert[first_block:end_block] = expert."""
    for start in range(first_block, end_block, 128):
        block = start + tl.arange(0, 128)
        tl.store(block_expert_ptr + block, tl.full([128], 0, tl.int32) + expert, mask=block < end_block)


@triton.jit
def take_blocks(taken_ptr, count, num_experts):
    """(the first of `count` blocks that are this program's, whether all other programs have theirs). `taken_ptr`: the blocks taken and
    MOST_BLOCKS for each program that took some or none; zero between launches, to which the last program sets it back. Which blocks a
    program gets is a race; an expert's lie together."""
    taken = tl.atomic_add(taken_ptr, count + MOST_BLOCKS, sem="relaxed")
    is_last = taken // MOST_BLOCKS == num_experts - 1
    if is_last:
        tl.store(taken_ptr, 0)
    return taken % MOST_BLOCKS, is_last


@triton.jit(do_not_specialize=["num_pairs", "max_blocks"])
def moe_route_kernel(
    ids_ptr,
    x_ptr,
    codes_ptr,
    scales_ptr,
    pairs_ptr,
    block_expert_ptr,
    taken_ptr,
    num_pairs,
    num_experts,
    max_blocks,
    width,
    padded_width,
    BLOCK_M: tl.constexpr,
    CHUNK: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """For few rows, in one launch: programs below num_experts list an expert's pairs, the others quantise 128 * GROUPS channels of a
    token."""
    program = tl.program_id(0)
    if program < num_experts:
        count = count_pairs(ids_ptr, 0, num_pairs, CHUNK)
        blocks = tl.cdiv(count, BLOCK_M)
        first_block, is_last = take_blocks(taken_ptr, blocks, num_experts)
        if count > 0:
            slot = list_pairs(ids_ptr, pairs_ptr, ids_ptr, 0, num_pairs, first_block * BLOCK_M, CHUNK, False)
            fill_up(pairs_ptr, slot, BLOCK_M)
            say_expert(block_expert_ptr, program, first_block, first_block + blocks)
        if is_last:
            say_expert(block_expert_ptr, -1, first_block + blocks, max_blocks)
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


@triton.jit(do_not_specialize=["num_blocks"])
def moe_rooms_kernel(
    counts_ptr, pairs_ptr, block_expert_ptr, listed_ptr, taken_ptr, room, num_experts, num_blocks,
    BLOCK_M: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Program e lists the rows that have come for expert e: e * room + row, in blocks, with -1 behind the last of a block. The last program
    says how many blocks there are, and that those behind them, of the first `num_blocks`, have no expert."""
    expert = tl.program_id(0)
    count = tl.load(counts_ptr + expert)
    blocks = tl.cdiv(count, BLOCK_M)
    first_block, is_last = take_blocks(taken_ptr, blocks, num_experts)
    for start in range(0, blocks * BLOCK_M, CHUNK):
        row = start + tl.arange(0, CHUNK)
        tl.store(pairs_ptr + first_block * BLOCK_M + row, tl.where(row < count, expert * room + row, -1), mask=row < blocks * BLOCK_M)
    say_expert(block_expert_ptr, expert, first_block, first_block + blocks)
    if is_last:
        tl.store(listed_ptr, first_block + blocks)
        say_expert(block_expert_ptr, -1, first_block + blocks, num_blocks)


@triton.jit(do_not_specialize=["num_pairs", "part_pairs", "max_blocks"])
def moe_list_kernel(
    ids_ptr,
    counts_ptr,
    pairs_ptr,
    block_expert_ptr,
    slots_ptr,
    ends_ptr,
    num_pairs,
    part_pairs,
    num_experts,
    max_blocks,
    PADDED_E: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """For many rows: program (e, part) lists the pairs of expert e in that part of all. An expert's blocks follow those of the one before;
    `ends` is the slot behind its last pair, or that of its first block, if it has none."""
    program, part = tl.program_id(0), tl.program_id(1)
    experts, parts = tl.arange(0, PADDED_E)[:, None], tl.arange(0, PARTS)[None, :]
    counts = tl.load(counts_ptr + experts * PARTS + parts, mask=experts < num_experts, other=0)
    blocks = tl.cdiv(tl.sum(counts, 1), BLOCK_M)
    first_block = tl.sum(tl.where(tl.arange(0, PADDED_E) < program, blocks, 0), 0)
    before = tl.sum(tl.sum(tl.where((experts == program) & (parts < part), counts, 0), 1), 0)
    start = part * part_pairs
    end = tl.minimum(start + part_pairs, num_pairs)
    slot = list_pairs(ids_ptr, pairs_ptr, slots_ptr, start, end, first_block * BLOCK_M + before, CHUNK, True)
    if part == PARTS - 1:
        fill_up(pairs_ptr, slot, BLOCK_M)
        say_expert(block_expert_ptr, program, first_block, tl.cdiv(slot, BLOCK_M))
        tl.store(ends_ptr + program, slot)
        if program == 0:
            say_expert(block_expert_ptr, -1, tl.sum(blocks, 0), max_blocks)


@triton.jit
def place_of(num_blocks, num_tiles, GROUP_BLOCKS: tl.constexpr):
    """(block, tile) of this program: GROUP_BLOCKS blocks of tokens take a tile of weights after each other, then the next tile."""
    program = tl.program_id(0)
    per_group = GROUP_BLOCKS * num_tiles
    first = program // per_group * GROUP_BLOCKS
    size = tl.minimum(num_blocks - first, GROUP_BLOCKS)
    return first + program % per_group % size, program % per_group // size


@triton.jit
def moe_sum_kernel(
    rows_ptr, ids_ptr, slots_ptr, sum_ptr, num_experts, width, row_width, TOP_K: tl.constexpr, CHANNELS: tl.constexpr, SLOTS: tl.constexpr
):
    """sum[token] = fp32 sum of the rows of its pairs, in order, rounded to sum's dtype; pairs of experts that are not here count nothing.
    With SLOTS a pair's row is where `slots` says, else its own."""
    token = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    total = tl.zeros([CHANNELS], tl.float32)
    for place in tl.static_range(TOP_K):
        pair = token * TOP_K + place
        expert = tl.load(ids_ptr + pair)
        here = (expert >= 0) & (expert < num_experts)
        row = pair
        if SLOTS:
            row = tl.load(slots_ptr + pair, mask=here, other=0).to(tl.int64)
        total += tl.load(rows_ptr + row * row_width + channel, mask=here & (channel < width), other=0.0).to(tl.float32)
    if sum_ptr.dtype.element_ty == tl.bfloat16:
        total = to_bf16(total)
    tl.store(sum_ptr + token * width + channel, total, mask=channel < width)


_LIST = {"ids_ptr": "*i64", "pairs_ptr": "*i32", "block_expert_ptr": "*i32", "num_pairs": "i32", "num_experts": "i32:16"}
_LIST |= {"max_blocks": "i32"}
_ROUTE = {**_LIST, "x_ptr": "*bf16", "codes_ptr": "*fp8e4nv", "scales_ptr": "*fp32", "width": "i32:16", "padded_width": "i32:16"}
_ROUTE |= {"taken_ptr": "*i32"}
_ROOMS = dict.fromkeys(("counts_ptr", "pairs_ptr", "block_expert_ptr", "listed_ptr", "taken_ptr"), "*i32")
_ROOMS |= dict.fromkeys(("room", "num_experts", "num_blocks"), "i32")
_SUM = {"rows_ptr": "*bf16", "ids_ptr": "*i64", "slots_ptr": "*i32", "num_experts": "i32:16", "width": "i32:16"}
_SUM |= {"row_width": "i32:16"}
AOT = [
    (moe_route_kernel, _ROUTE, {"BLOCK_M": 16, "CHUNK": 1024, "GROUPS": 8}, {"num_warps": 4}),
    *((moe_rooms_kernel, _ROOMS, {"BLOCK_M": block_m, "CHUNK": 128}, {"num_warps": 4}) for block_m in (16, 32)),
    (
        moe_count_kernel,
        {"ids_ptr": "*i64", "counts_ptr": "*i32", "num_pairs": "i32", "part_pairs": "i32"},
        {"CHUNK": 4096},
        {"num_warps": 8},
    ),
    (
        moe_list_kernel,
        {**_LIST, "counts_ptr": "*i32", "slots_ptr": "*i32", "ends_ptr": "*i32", "part_pairs": "i32"},
        {"PADDED_E": 512, "PARTS": 8, "BLOCK_M": 128, "CHUNK": 4096},
        {"num_warps": 8},
    ),
    *(
        (moe_sum_kernel, _SUM | {"sum_ptr": dtype}, {"TOP_K": 6, "CHANNELS": 1024, "SLOTS": slots}, {"num_warps": 4})
        for slots, dtype in ((False, "*fp32"), (True, "*fp32"), (True, "*bf16"))
    ),
]

"""Kernels of the routed experts that move rows: which pair goes to which expert, and the sum over a token's experts."""

from __future__ import annotations

import triton
import triton.language as tl

from engine.ops.triton_rounding import quantize, to_bf16

BLOCK = tl.constexpr(128)


@triton.jit(do_not_specialize=["num_pairs"])
def moe_count_kernel(ids_ptr, counts_ptr, num_pairs, CHUNK: tl.constexpr):
    """counts[expert] = pairs of it."""
    expert = tl.program_id(0)
    count = tl.zeros([CHUNK], tl.int32)
    for start in range(0, num_pairs, CHUNK):
        pair = start + tl.arange(0, CHUNK)
        count += (tl.load(ids_ptr + pair, mask=pair < num_pairs, other=-1) == expert).to(tl.int32)
    tl.store(counts_ptr + expert, tl.sum(count, 0))


@triton.jit
def count_pairs(ids_ptr, counts_ptr, num_pairs, num_experts, PADDED_E: tl.constexpr, CHUNK: tl.constexpr, COUNTED: tl.constexpr):
    """int32 [PADDED_E]: pairs of each expert."""
    experts = tl.arange(0, PADDED_E)
    if COUNTED:
        counts = tl.load(counts_ptr + experts, mask=experts < num_experts, other=0)
    else:
        counts = tl.zeros([PADDED_E], tl.int32)
        for start in range(0, num_pairs, CHUNK):
            pair = start + tl.arange(0, CHUNK)
            local = tl.load(ids_ptr + pair, mask=pair < num_pairs, other=-1).to(tl.int32)
            local = tl.where((pair < num_pairs) & (local >= 0) & (local < num_experts), local, PADDED_E - 1)
            counts += tl.histogram(local, PADDED_E)
        counts = tl.where(experts < num_experts, counts, 0)
    return counts


@triton.jit
def list_pairs(
    ids_ptr,
    counts_ptr,
    pairs_ptr,
    block_expert_ptr,
    slots_ptr,
    ends_ptr,
    num_pairs,
    num_experts,
    max_blocks,
    PADDED_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    CHUNK: tl.constexpr,
    COUNTED: tl.constexpr,
):
    """Program e lists the pairs of expert e, in order, in blocks of BLOCK_M with -1 behind the last; program 0 also says that the
    remaining blocks are nobody's. COUNTED: counts are there, and each pair's slot is kept, too, and the slot behind each expert's last
    pair (that of its first block, if it has none)."""
    program = tl.program_id(0)
    experts = tl.arange(0, PADDED_E)
    counts = count_pairs(ids_ptr, counts_ptr, num_pairs, num_experts, PADDED_E, CHUNK, COUNTED)
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
            mine = tl.load(ids_ptr + pair, mask=pair < num_pairs, other=-1) == program
            slot = base + found + tl.cumsum(mine.to(tl.int32), 0) - 1
            tl.store(pairs_ptr + slot, pair, mask=mine)
            if COUNTED:
                tl.store(slots_ptr + pair, slot, mask=mine)
            found += tl.sum(mine.to(tl.int32), 0)
        place = found + tl.arange(0, BLOCK_M)
        tl.store(pairs_ptr + base + place, tl.full([BLOCK_M], -1, tl.int32), mask=place < own_blocks * BLOCK_M)
    if COUNTED:
        tl.store(ends_ptr + program, base + found)
    if program == 0:
        for block in range(tl.sum(blocks, 0), max_blocks):
            tl.store(block_expert_ptr + block, -1)


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
    """For few rows, in one launch: programs below num_experts list an expert's pairs, the others quantise 128 * GROUPS channels of a
    token."""
    program = tl.program_id(0)
    if program < num_experts:
        list_pairs(
            ids_ptr,
            ids_ptr,
            pairs_ptr,
            block_expert_ptr,
            ids_ptr,
            ids_ptr,
            num_pairs,
            num_experts,
            max_blocks,
            PADDED_E,
            BLOCK_M,
            CHUNK,
            False,
        )
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


@triton.jit(do_not_specialize=["num_pairs", "max_blocks"])
def moe_list_kernel(
    ids_ptr,
    counts_ptr,
    pairs_ptr,
    block_expert_ptr,
    slots_ptr,
    ends_ptr,
    num_pairs,
    num_experts,
    max_blocks,
    PADDED_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """For many rows: program e lists the pairs of expert e."""
    list_pairs(
        ids_ptr,
        counts_ptr,
        pairs_ptr,
        block_expert_ptr,
        slots_ptr,
        ends_ptr,
        num_pairs,
        num_experts,
        max_blocks,
        PADDED_E,
        BLOCK_M,
        CHUNK,
        True,
    )


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
_SUM = {"rows_ptr": "*bf16", "ids_ptr": "*i64", "slots_ptr": "*i32", "num_experts": "i32:16", "width": "i32:16"}
_SUM |= {"row_width": "i32:16"}
AOT = [
    (moe_route_kernel, _ROUTE, {"PADDED_E": 512, "BLOCK_M": 16, "CHUNK": 1024, "GROUPS": 8}, {"num_warps": 4}),
    (moe_count_kernel, {"ids_ptr": "*i64", "counts_ptr": "*i32", "num_pairs": "i32"}, {"CHUNK": 4096}, {"num_warps": 8}),
    (
        moe_list_kernel,
        {**_LIST, "counts_ptr": "*i32", "slots_ptr": "*i32", "ends_ptr": "*i32"},
        {"PADDED_E": 512, "BLOCK_M": 128, "CHUNK": 4096},
        {"num_warps": 8},
    ),
    *(
        (moe_sum_kernel, _SUM | {"sum_ptr": dtype}, {"TOP_K": 6, "CHANNELS": 1024, "SLOTS": slots}, {"num_warps": 4})
        for slots, dtype in ((False, "*fp32"), (True, "*fp32"), (True, "*bf16"))
    ),
]

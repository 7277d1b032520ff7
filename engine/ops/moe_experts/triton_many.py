"""Kernels of the routed experts for many rows an expert, where the arithmetic counts.

MXFP4 tiles are widened to FP8 rows with one scale per 128 x 128 first, once a call: 1.5 bytes a weight through memory, against
thousands of products with it. That is exact while the group scales of a tile lie within 2^14 of each other (`pack` looks). Rows of x
are gathered into slots: blocks of BLOCK_M slots belong to one expert, so that any grouped FP8 product serves, ours or a library's.
"""

from __future__ import annotations

import triton
import triton.language as tl

from engine.ops.moe_experts.triton_few import decode, decode_portable
from engine.ops.moe_experts.triton_route import place_of
from engine.ops.triton_rounding import INTERPRETED, quantize, round_bf16, to_bf16, to_fp8

BLOCK = tl.constexpr(128)


@triton.jit
def moe_widen_kernel(tiles_ptr, words_ptr, wide_ptr, scale_ptr, num_tiles, k_tiles, PLACES: tl.constexpr):
    """One MXFP4 tile (triton_few.py) -> its place in e4m3 [E, PLACES, num_tiles * 128, k_tiles * 128], and its fp32 scale."""
    program = tl.program_id(0).to(tl.int64)
    place, k = program % PLACES, program // PLACES % k_tiles
    expert, tile = program // PLACES // k_tiles // num_tiles, program // PLACES // k_tiles % num_tiles
    n_tile = (expert * PLACES + place) * num_tiles + tile
    row = tl.arange(0, BLOCK)
    words = tl.load(words_ptr + program * BLOCK + row)
    byte = (words >> 16) & 255
    largest = tl.max(byte, 0)
    factor = ((byte - largest + 127) << 23).to(tl.float32, bitcast=True)[:, None]
    tile_ptr = tiles_ptr + program * (BLOCK * BLOCK // 2)
    at = wide_ptr + (n_tile * BLOCK + row[:, None]) * (k_tiles * BLOCK) + k * BLOCK + tl.arange(0, 32)[None, :]
    packed = tile_ptr + row[:, None] * 32 + tl.arange(0, 32)[None, :]
    for half in tl.static_range(2):
        if INTERPRETED:
            first, second = decode_portable(tile_ptr, words[:, None], half)
        else:
            first, second = decode(tl.load(packed + half * (BLOCK * 32)), words[:, None], half)
        tl.store(at + half * 64, to_fp8(first.to(tl.float32) * factor))
        tl.store(at + half * 64 + 32, to_fp8(second.to(tl.float32) * factor))
    tl.store(scale_ptr + n_tile * k_tiles + k, (largest << 23).to(tl.float32, bitcast=True))


@triton.jit(do_not_specialize=["num_slots"])
def moe_gather_kernel(
    x_ptr,
    x_scale_ptr,
    x_stride,
    x_scale_stride,
    pairs_ptr,
    block_expert_ptr,
    codes_ptr,
    scales_ptr,
    num_slots,
    top_k,
    width,
    k_tiles,
    QUANTIZED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Slot s gets the token of its pair, quantised, here unless it came so: codes [num_slots, k_tiles * 128], scales [k_tiles, num_slots].
    Slots of a block behind its last pair keep what is there: nobody reads what comes of them."""
    if tl.load(block_expert_ptr + tl.program_id(0) * ROWS // BLOCK_M) < 0:
        return
    slot, group, pair = places(pairs_ptr, ROWS, GROUPS)
    token = (tl.maximum(pair, 0) // top_k).to(tl.int64)
    channel = group * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (group < k_tiles) & (pair >= 0)
    if QUANTIZED:
        codes = tl.load(x_ptr + token * x_stride + channel, mask=inside)
        scale = tl.load(x_scale_ptr + token * x_scale_stride + group, mask=inside)
    else:
        x = tl.load(x_ptr + token * x_stride + channel, mask=(pair >= 0) & (channel < width), other=0.0)
        codes, scale = quantize(x.to(tl.float32), 1)
    tl.store(codes_ptr + slot * (k_tiles * BLOCK) + channel, codes, mask=inside)
    tl.store(scales_ptr + group.to(tl.int64) * num_slots + slot, scale, mask=inside)


@triton.jit
def places(pairs_ptr, ROWS: tl.constexpr, GROUPS: tl.constexpr):
    """[ROWS * GROUPS, 1] each, for program (some slots, some groups of 128 channels): slot (int64), group, and the slot's pair."""
    place = tl.arange(0, ROWS * GROUPS)[:, None]
    slot = tl.program_id(0).to(tl.int64) * ROWS + place // GROUPS
    return slot, tl.program_id(1) * GROUPS + place % GROUPS, tl.load(pairs_ptr + slot)


@triton.jit(do_not_specialize=["num_slots"])
def moe_many_kernel(
    codes_ptr,
    scales_ptr,
    wide_ptr,
    wide_scales_ptr,
    block_expert_ptr,
    out_ptr,
    num_slots,
    num_tiles,
    k_tiles,
    BLOCK_M: tl.constexpr,
    GROUP_BLOCKS: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """out[slot] = w row[slot], bf16 [num_slots, num_tiles * 128], for one block of slots and 128 channels."""
    block, tile = place_of(num_slots // BLOCK_M, num_tiles, GROUP_BLOCKS)
    expert = tl.load(block_expert_ptr + block)
    if expert < 0:
        return
    slot = block.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK)
    n_tile = expert.to(tl.int64) * num_tiles + tile
    x_ptr = codes_ptr + slot[:, None] * (k_tiles * BLOCK) + n[None, :]
    weight_ptr = wide_ptr + (n_tile * BLOCK + n[None, :]) * (k_tiles * BLOCK) + n[:, None]
    total = tl.zeros([BLOCK_M, BLOCK], tl.float32)
    scale = tl.load(scales_ptr + slot)
    wide_scale = tl.load(wide_scales_ptr + n_tile * k_tiles)
    for k in tl.range(0, k_tiles, num_stages=NUM_STAGES):
        after = tl.minimum(k + 1, k_tiles - 1)
        next_scale = tl.load(scales_ptr + after.to(tl.int64) * num_slots + slot)
        next_wide_scale = tl.load(wide_scales_ptr + n_tile * k_tiles + after)
        part = tl.dot(tl.load(x_ptr + k * BLOCK), tl.load(weight_ptr + k * BLOCK))
        total += part * (scale * wide_scale)[:, None]
        scale, wide_scale = next_scale, next_wide_scale
    tl.store(out_ptr + slot[:, None] * (num_tiles * BLOCK) + tile * BLOCK + n[None, :], to_bf16(total))


@triton.jit(do_not_specialize=["num_slots"])
def moe_act_kernel(
    gate_up_ptr,
    pairs_ptr,
    block_expert_ptr,
    weights_ptr,
    codes_ptr,
    scales_ptr,
    num_slots,
    num_tiles,
    limit,
    BLOCK_M: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Slot s gets the quantised clamped SwiGLU of bf16 [gate | up] times its pair's weight: codes [num_slots, num_tiles * 128], scales
    [num_tiles, num_slots]."""
    if tl.load(block_expert_ptr + tl.program_id(0) * ROWS // BLOCK_M) < 0:
        return
    slot, group, pair = places(pairs_ptr, ROWS, GROUPS)
    channel = group * BLOCK + tl.arange(0, BLOCK)[None, :]
    width = num_tiles * BLOCK
    inside = (group < num_tiles) & (pair >= 0)
    gate = tl.minimum(tl.load(gate_up_ptr + slot * 2 * width + channel, mask=inside, other=0.0).to(tl.float32), limit)
    up = tl.load(gate_up_ptr + (slot * 2 + 1) * width + channel, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weights_ptr + tl.maximum(pair, 0))
    hidden = gate / (1.0 + tl.exp(-gate)) * tl.minimum(tl.maximum(up, -limit), limit) * weight
    codes, scale = quantize(round_bf16(hidden), 1)
    tl.store(codes_ptr + slot * width + channel, codes, mask=inside)
    tl.store(scales_ptr + group.to(tl.int64) * num_slots + slot, scale, mask=inside)


_FP8, _I32, _WIDE = "*fp8e4nv", "*i32", "i32:16"
_SLOTS = {"codes_ptr": _FP8, "scales_ptr": "*fp32", "block_expert_ptr": _I32, "num_slots": "i32"}
_GATHER = {**_SLOTS, "pairs_ptr": _I32, "top_k": "i32", **dict.fromkeys(("width", "k_tiles", "x_stride", "x_scale_stride"), _WIDE)}
_MANY = {**_SLOTS, "wide_ptr": _FP8, "wide_scales_ptr": "*fp32", "out_ptr": "*bf16", "num_tiles": _WIDE, "k_tiles": _WIDE}
_ACT = {**_SLOTS, "gate_up_ptr": "*bf16", "pairs_ptr": _I32, "weights_ptr": "*fp32", "num_tiles": _WIDE, "limit": "fp32"}
_WIDEN = {"tiles_ptr": "*u8", "words_ptr": _I32, "wide_ptr": _FP8, "scale_ptr": "*fp32", "num_tiles": _WIDE, "k_tiles": _WIDE}
AOT = [
    *((moe_widen_kernel, _WIDEN, {"PLACES": places}, {"num_warps": 4}) for places in (1, 2)),
    *(
        (
            moe_gather_kernel,
            _GATHER | {"x_ptr": dtype, "x_scale_ptr": scale_dtype},
            {"QUANTIZED": quantized, "BLOCK_M": 128, "ROWS": 4, "GROUPS": 32},
            {"num_warps": 8},
        )
        for dtype, scale_dtype, quantized in (("*bf16", "*bf16", False), (_FP8, "*fp32", True))
    ),
    *(
        (moe_many_kernel, _MANY, {"BLOCK_M": block_m, "GROUP_BLOCKS": 8, "NUM_STAGES": stages}, {"num_warps": warps})
        for block_m, stages, warps in ((64, 4, 4), (128, 3, 8))
    ),
    (moe_act_kernel, _ACT, {"BLOCK_M": 128, "ROWS": 4, "GROUPS": 16}, {"num_warps": 8}),
]

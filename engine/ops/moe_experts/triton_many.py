"""Kernels of the routed experts for many rows an expert, where the arithmetic counts.

MXFP4 tiles are widened to FP8 with one scale per 128 x 128 first, once a call: 1.5 bytes a weight through memory, against thousands
of products with it. That is exact while the group scales of a tile lie within 2^14 of each other (`pack` looks). Then come FP8
products, as for FP8 checkpoints.
"""

from __future__ import annotations

import triton
import triton.language as tl

from engine.ops.moe_experts.triton_few import decode, decode_portable
from engine.ops.moe_experts.triton_route import place_of
from engine.ops.triton_rounding import INTERPRETED, quantize, round_bf16, to_bf16, to_fp8

BLOCK = tl.constexpr(128)


@triton.jit
def moe_widen_kernel(tiles_ptr, words_ptr, wide_ptr, scale_ptr):
    """One MXFP4 tile of 128 x 128 (triton_few.py) -> e4m3 [128, 128] and its fp32 scale."""
    program = tl.program_id(0).to(tl.int64)
    row = tl.arange(0, BLOCK)
    words = tl.load(words_ptr + program * BLOCK + row)
    byte = (words >> 16) & 255
    largest = tl.max(byte, 0)
    factor = ((byte - largest + 127) << 23).to(tl.float32, bitcast=True)[:, None]
    tile_ptr = tiles_ptr + program * (BLOCK * BLOCK // 2)
    at = wide_ptr + program * (BLOCK * BLOCK) + row[:, None] * BLOCK + tl.arange(0, 32)[None, :]
    packed = tile_ptr + row[:, None] * 32 + tl.arange(0, 32)[None, :]
    for half in tl.static_range(2):
        if INTERPRETED:
            first, second = decode_portable(tile_ptr, words[:, None], half)
        else:
            first, second = decode(tl.load(packed + half * (BLOCK * 32)), words[:, None], half)
        tl.store(at + half * 64, to_fp8(first.to(tl.float32) * factor))
        tl.store(at + half * 64 + 32, to_fp8(second.to(tl.float32) * factor))
    tl.store(scale_ptr + program, (largest << 23).to(tl.float32, bitcast=True))


@triton.jit(do_not_specialize=["num_blocks"])
def moe_many_kernel(
    codes_ptr,
    scales_ptr,
    wide_ptr,
    wide_scales_ptr,
    pairs_ptr,
    block_expert_ptr,
    out_ptr,
    num_blocks,
    num_tiles,
    k_tiles,
    pairs_per_row,
    width,
    PLACES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    GROUP_BLOCKS: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """out[pair, place, channel] = w row[pair // pairs_per_row], bf16 [pairs, PLACES, width], for one block of pairs and 128 channels."""
    block, column = place_of(num_blocks, num_tiles * PLACES, GROUP_BLOCKS)
    expert = tl.load(block_expert_ptr + block)
    if expert < 0:
        return
    pairs = tl.load(pairs_ptr + block * BLOCK_M + tl.arange(0, BLOCK_M))
    row = (tl.maximum(pairs, 0) // pairs_per_row).to(tl.int64)
    n = tl.arange(0, BLOCK)
    tile, place = column // PLACES, column % PLACES
    first = (expert * num_tiles + tile).to(tl.int64) * k_tiles * PLACES + place
    x_ptr = codes_ptr + row[:, None] * (k_tiles * BLOCK) + n[None, :]
    tile_ptr = wide_ptr + first * (BLOCK * BLOCK) + n[:, None] + n[None, :] * BLOCK
    total = tl.zeros([BLOCK_M, BLOCK], tl.float32)
    scale = tl.load(scales_ptr + row * k_tiles)
    wide_scale = tl.load(wide_scales_ptr + first)
    for k in tl.range(0, k_tiles, num_stages=NUM_STAGES):
        after = tl.minimum(k + 1, k_tiles - 1)
        next_scale = tl.load(scales_ptr + row * k_tiles + after)
        next_wide_scale = tl.load(wide_scales_ptr + first + after * PLACES)
        part = tl.dot(tl.load(x_ptr + k * BLOCK), tl.load(tile_ptr + k * (PLACES * BLOCK * BLOCK)))
        total += part * (scale * wide_scale)[:, None]
        scale, wide_scale = next_scale, next_wide_scale
    channel = tile * BLOCK + n
    at = (tl.maximum(pairs, 0).to(tl.int64)[:, None] * PLACES + place) * width + channel[None, :]
    tl.store(out_ptr + at, to_bf16(total), mask=(pairs[:, None] >= 0) & (channel[None, :] < width))


@triton.jit
def moe_act_kernel(gate_up_ptr, ids_ptr, weights_ptr, hidden_ptr, hidden_scales_ptr, num_experts, num_tiles, limit, GROUPS: tl.constexpr):
    """hidden[pair] = quantised clamped SwiGLU * weight of bf16 [pair, gate | up], for 128 * GROUPS channels."""
    pair = tl.program_id(0).to(tl.int64)
    expert = tl.load(ids_ptr + pair)
    if (expert < 0) | (expert >= num_experts):
        return
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    channel = group[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    width = num_tiles * BLOCK
    inside = channel < width
    gate = tl.minimum(tl.load(gate_up_ptr + pair * 2 * width + channel, mask=inside, other=0.0).to(tl.float32), limit)
    up = tl.load(gate_up_ptr + (pair * 2 + 1) * width + channel, mask=inside, other=0.0).to(tl.float32)
    hidden = gate / (1.0 + tl.exp(-gate)) * tl.minimum(tl.maximum(up, -limit), limit) * tl.load(weights_ptr + pair)
    codes, scale = quantize(round_bf16(hidden), 1)
    tl.store(hidden_ptr + pair * width + channel, codes, mask=inside)
    tl.store(hidden_scales_ptr + pair * num_tiles + group[:, None], scale, mask=group[:, None] < num_tiles)


_FP8, _I32, _WIDE = "*fp8e4nv", "*i32", "i32:16"
_MANY = {"codes_ptr": _FP8, "scales_ptr": "*fp32", "wide_ptr": _FP8, "wide_scales_ptr": "*fp32", "pairs_ptr": _I32}
_MANY |= {"block_expert_ptr": _I32, "out_ptr": "*bf16", "num_blocks": "i32", "num_tiles": _WIDE, "k_tiles": _WIDE}
_MANY |= {"pairs_per_row": "i32", "width": _WIDE}
_ACT = {"gate_up_ptr": "*bf16", "ids_ptr": "*i64", "weights_ptr": "*fp32", "hidden_ptr": _FP8, "hidden_scales_ptr": "*fp32"}
_ACT |= {"num_experts": _WIDE, "num_tiles": _WIDE, "limit": "fp32"}
_WIDEN = {"tiles_ptr": "*u8", "words_ptr": _I32, "wide_ptr": _FP8, "scale_ptr": "*fp32"}
AOT = [
    (moe_widen_kernel, _WIDEN, {}, {"num_warps": 4}),
    *(
        (moe_many_kernel, _MANY, {"PLACES": places, "BLOCK_M": 128, "GROUP_BLOCKS": 8, "NUM_STAGES": 3}, {"num_warps": 8})
        for places in (1, 2)
    ),
    (moe_act_kernel, _ACT, {"GROUPS": 8}, {"num_warps": 4}),
]

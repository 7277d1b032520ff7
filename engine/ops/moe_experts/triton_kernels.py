"""Kernels of the routed experts over 4-bit weights: route, w1|w3 product with SwiGLU, w2 product, sum. Launched by triton.py.

Products run on FP8 matrix units (W4A8). e2m1 codes become e4m3 in registers through a byte table per group of 32 channels, so that
the group scale is part of the e4m3 value: exact as long as a group's scale lies within 2^11 of the largest of its 128 channels
(`pack` checks). What remains, one power of two per row and 128 channels, multiplies the fp32 partial product together with the
activations' scale: the matrix units never sum more than 128 channels, whose FP8 accumulation is short of fp32.

Layout of weights (`pack` makes it): tiles of 128 rows x 128 channels, 8 KiB in one piece: two halves [128 rows, 32 bytes], half h
holding channel groups 2h and 2h + 1. In each 4 bytes lie channels c..c+3 of both groups: nibble i of the low 16 bits is the
magnitude of channel c + i of group 2h, nibble i of the high 16 bits that of group 2h + 1; bit 8 i + 3 is the sign of the former,
bit 8 i + 7 of the latter. `words` has an int32 per row and tile: bits 4 g..4 g + 3 the exponent of group g (2..13, biased so that
e4m3's 1.0 is 7), bits 16..23 the ue8m0 byte of what remains.
"""

from __future__ import annotations

import triton
import triton.language as tl

from engine.ops.triton_rounding import INTERPRETED, quantize, round_bf16, to_bf16

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
def tables(words, GROUP: tl.constexpr):
    """The e4m3 bytes of magnitudes 0, 0.5, 1, 1.5 and 2, 3, 4, 6 at a group's exponent, each in an int32 like `words`."""
    exponent = (words >> (4 * GROUP)) & 15
    return exponent * 0x08080800 + 0x03FFF800, exponent * 0x08080808 + 0x14100C08


@triton.jit
def decode(packed, words, HALF: tl.constexpr):
    """uint8 [N, 32] and int32 [N, 1] -> e4m3 [N, 32] of groups 2 HALF and 2 HALF + 1."""
    low0, high0 = tables(words, 2 * HALF)
    low1, high1 = tables(words, 2 * HALF + 1)
    first, second = tl.inline_asm_elementwise(
        asm="""{
            .reg .b32 s, t;
            and.b32 s, $2, 0x77777777;
            shl.b32 t, $2, 4;
            and.b32 t, t, 0x80808080;
            prmt.b32 $0, $3, $7, s;
            or.b32 $0, $0, t;
            shr.u32 s, s, 16;
            and.b32 t, $2, 0x80808080;
            prmt.b32 $1, $11, $15, s;
            or.b32 $1, $1, t;
        }""",
        constraints="=&r,=&r,r" + ",r" * 16,
        args=[packed, low0, high0, low1, high1],
        dtype=(tl.uint8, tl.uint8),
        is_pure=True,
        pack=4,
    )
    return first.to(tl.float8e4nv, bitcast=True), second.to(tl.float8e4nv, bitcast=True)


@triton.jit
def decode_portable(tile_ptr, words, HALF: tl.constexpr):
    """What `decode` does, for the interpreter, which knows no assembly; loads for itself."""
    channel = tl.arange(0, 32)[None, :]
    row = tile_ptr + HALF * BLOCK * 32 + tl.arange(0, BLOCK)[:, None] * 32 + channel // 4 * 4
    sign = tl.load(row + channel % 4).to(tl.int32)
    first = tl.load(row + channel % 4 // 2).to(tl.int32) >> (channel % 2 * 4)
    second = tl.load(row + 2 + channel % 4 // 2).to(tl.int32) >> (channel % 2 * 4)
    low0, high0 = tables(words, 2 * HALF)
    low1, high1 = tables(words, 2 * HALF + 1)
    first = (tl.where((first & 4) != 0, high0, low0) >> (8 * (first & 3))) & 0x7F | ((sign & 8) << 4)
    second = (tl.where((second & 4) != 0, high1, low1) >> (8 * (second & 3))) & 0x7F | (sign & 0x80)
    return first.to(tl.uint8).to(tl.float8e4nv, bitcast=True), second.to(tl.uint8).to(tl.float8e4nv, bitcast=True)


@triton.jit
def partial(tile_ptr, words_ptr, x0, x1, x2, x3, FP4: tl.constexpr):
    """One tile of weights [128, 128] times x [128, M]: fp32 [128, M], scaled but for the activations' scale.

    FP4: x0..x3 are groups of 32 channels; else all four are the tile's 128 channels."""
    row = tl.arange(0, BLOCK)
    words = tl.load(words_ptr + row)
    if FP4:
        if INTERPRETED:
            a0, a1 = decode_portable(tile_ptr, words[:, None], 0)
            a2, a3 = decode_portable(tile_ptr, words[:, None], 1)
        else:
            packed = row[:, None] * 32 + tl.arange(0, 32)[None, :]
            a0, a1 = decode(tl.load(tile_ptr + packed), words[:, None], 0)
            a2, a3 = decode(tl.load(tile_ptr + BLOCK * 32 + packed), words[:, None], 1)
        out = tl.dot(a0, x0)
        out = tl.dot(a1, x1, out)
        out = tl.dot(a2, x2, out)
        out = tl.dot(a3, x3, out)
        out = out * (((words >> 16) & 255) << 23).to(tl.float32, bitcast=True)[:, None]
    else:
        weight = tl.load(tile_ptr + row[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :])
        out = tl.dot(weight, x0) * words.to(tl.float32, bitcast=True)[:, None]
    return out


@triton.jit
def load_x(codes_ptr, rows, FP4: tl.constexpr):
    """[channels, M] tiles of FP8 codes: four of 32 channels, or one of 128 (four times). rows: [M] offsets of 128 channels."""
    if FP4:
        at = codes_ptr + rows[None, :] + tl.arange(0, 32)[:, None]
        x = tl.load(at), tl.load(at + 32), tl.load(at + 64), tl.load(at + 96)
    else:
        x = (tl.load(codes_ptr + rows[None, :] + tl.arange(0, BLOCK)[:, None]),) * 4
    return x


@triton.jit
def place_of(num_blocks, num_tiles, GROUP_BLOCKS: tl.constexpr):
    """(block, tile) of this program: GROUP_BLOCKS blocks of tokens take a tile of weights after each other, then the next tile."""
    program = tl.program_id(0)
    per_group = GROUP_BLOCKS * num_tiles
    first = program // per_group * GROUP_BLOCKS
    size = tl.minimum(num_blocks - first, GROUP_BLOCKS)
    return first + program % per_group % size, program % per_group // size


@triton.jit(do_not_specialize=["num_blocks"])
def moe_hidden_kernel(
    codes_ptr,
    scales_ptr,
    tiles_ptr,
    words_ptr,
    pairs_ptr,
    block_expert_ptr,
    weights_ptr,
    hidden_ptr,
    hidden_scales_ptr,
    num_blocks,
    num_tiles,
    k_tiles,
    top_k,
    limit,
    BLOCK_M: tl.constexpr,
    GROUP_BLOCKS: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    FP4: tl.constexpr,
):
    """hidden[pair] = quantised clamped SwiGLU(w1 x, w3 x) * weight, for one block of pairs and 128 channels."""
    block, tile = place_of(num_blocks, num_tiles, GROUP_BLOCKS)
    expert = tl.load(block_expert_ptr + block)
    if expert < 0:
        return
    TILE: tl.constexpr = BLOCK * BLOCK // 2 if FP4 else BLOCK * BLOCK
    pairs = tl.load(pairs_ptr + block * BLOCK_M + tl.arange(0, BLOCK_M))
    tokens = (tl.maximum(pairs, 0) // top_k).to(tl.int64)
    x_rows = tokens * (k_tiles * BLOCK)
    first = (expert * num_tiles + tile).to(tl.int64) * k_tiles * 2
    gate = tl.zeros([BLOCK, BLOCK_M], tl.float32)
    up = tl.zeros([BLOCK, BLOCK_M], tl.float32)
    scale = tl.load(scales_ptr + tokens * k_tiles)
    for k in tl.range(0, k_tiles, num_stages=NUM_STAGES):
        x0, x1, x2, x3 = load_x(codes_ptr + k * BLOCK, x_rows, FP4)
        tile_ptr = tiles_ptr + (first + 2 * k) * TILE
        word_ptr = words_ptr + (first + 2 * k) * BLOCK
        next_scale = tl.load(scales_ptr + tokens * k_tiles + tl.minimum(k + 1, k_tiles - 1))
        gate += partial(tile_ptr, word_ptr, x0, x1, x2, x3, FP4) * scale[None, :]
        up += partial(tile_ptr + TILE, word_ptr + BLOCK, x0, x1, x2, x3, FP4) * scale[None, :]
        scale = next_scale
    gate = tl.minimum(round_bf16(gate), limit)
    up = tl.minimum(tl.maximum(round_bf16(up), -limit), limit)
    weight = tl.load(weights_ptr + tl.maximum(pairs, 0))
    hidden = gate / (1.0 + tl.exp(-gate)) * up * weight[None, :]
    out, out_scale = quantize(round_bf16(hidden), 0)
    row = tl.maximum(pairs, 0).to(tl.int64)[None, :] * num_tiles + tile
    real = pairs[None, :] >= 0
    tl.store(hidden_ptr + row * BLOCK + tl.arange(0, BLOCK)[:, None], out, mask=real)
    tl.store(hidden_scales_ptr + row, out_scale, mask=real)


@triton.jit(do_not_specialize=["num_blocks"])
def moe_out_kernel(
    hidden_ptr,
    hidden_scales_ptr,
    tiles_ptr,
    words_ptr,
    pairs_ptr,
    block_expert_ptr,
    out_ptr,
    num_blocks,
    num_tiles,
    k_tiles,
    width,
    BLOCK_M: tl.constexpr,
    GROUP_BLOCKS: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    FP4: tl.constexpr,
):
    """out[pair] = w2 hidden[pair], bf16, for one block of pairs and 128 channels."""
    block, tile = place_of(num_blocks, num_tiles, GROUP_BLOCKS)
    expert = tl.load(block_expert_ptr + block)
    if expert < 0:
        return
    TILE: tl.constexpr = BLOCK * BLOCK // 2 if FP4 else BLOCK * BLOCK
    pairs = tl.load(pairs_ptr + block * BLOCK_M + tl.arange(0, BLOCK_M))
    row = tl.maximum(pairs, 0).to(tl.int64)
    first = (expert * num_tiles + tile).to(tl.int64) * k_tiles
    total = tl.zeros([BLOCK, BLOCK_M], tl.float32)
    scale = tl.load(hidden_scales_ptr + row * k_tiles)
    for k in tl.range(0, k_tiles, num_stages=NUM_STAGES):
        x0, x1, x2, x3 = load_x(hidden_ptr + k * BLOCK, row * (k_tiles * BLOCK), FP4)
        next_scale = tl.load(hidden_scales_ptr + row * k_tiles + tl.minimum(k + 1, k_tiles - 1))
        part = partial(tiles_ptr + (first + k) * TILE, words_ptr + (first + k) * BLOCK, x0, x1, x2, x3, FP4)
        total += part * scale[None, :]
        scale = next_scale
    channel = tile * BLOCK + tl.arange(0, BLOCK)
    out = tl.trans(to_bf16(total))
    tl.store(out_ptr + row[:, None] * width + channel[None, :], out, mask=(pairs[:, None] >= 0) & (channel[None, :] < width))


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


_FP8, _I32, _WIDE = "*fp8e4nv", "*i32", "i32:16"
_ROUTE = {
    "ids_ptr": "*i64",
    "x_ptr": "*bf16",
    "codes_ptr": _FP8,
    "scales_ptr": "*fp32",
    "pairs_ptr": _I32,
    "block_expert_ptr": _I32,
    "num_pairs": "i32",
    "num_experts": _WIDE,
    "max_blocks": "i32",
    "width": _WIDE,
    "padded_width": _WIDE,
}
_PRODUCT = {
    "words_ptr": _I32,
    "pairs_ptr": _I32,
    "block_expert_ptr": _I32,
    "hidden_ptr": _FP8,
    "hidden_scales_ptr": "*fp32",
    "num_blocks": "i32",
    "num_tiles": _WIDE,
    "k_tiles": _WIDE,
}
_HIDDEN = {**_PRODUCT, "codes_ptr": _FP8, "scales_ptr": "*fp32", "weights_ptr": "*fp32", "top_k": "i32", "limit": "fp32"}
_OUT = {**_PRODUCT, "out_ptr": "*bf16", "width": _WIDE}
_SUM = {"out_ptr": "*bf16", "ids_ptr": "*i64", "sum_ptr": "*fp32", "num_experts": _WIDE, "width": _WIDE}


def _products(kernel, signature):
    for fp4, block_m, warps, stages in ((True, 16, 4, 4), (True, 128, 8, 3), (False, 16, 4, 4)):
        constexprs = {"BLOCK_M": block_m, "GROUP_BLOCKS": 1, "NUM_STAGES": stages, "FP4": fp4}
        yield kernel, {**signature, "tiles_ptr": "*u8" if fp4 else _FP8}, constexprs, {"num_warps": warps}


AOT = [
    (moe_route_kernel, _ROUTE, {"PADDED_E": 512, "BLOCK_M": 16, "CHUNK": 1024, "GROUPS": 8}, {"num_warps": 4}),
    *_products(moe_hidden_kernel, _HIDDEN),
    *_products(moe_out_kernel, _OUT),
    (moe_sum_kernel, _SUM, {"TOP_K": 6, "CHANNELS": 1024}, {"num_warps": 4}),
]

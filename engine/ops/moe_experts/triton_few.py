"""Kernels of the routed experts for few rows an expert, where the bytes of the weights count.

Products run on FP8 matrix units (W4A8). e2m1 codes become e4m3 in registers through a byte table per group of 32 channels, so that
the group scale is part of the e4m3 value: exact as long as a group's scale lies within 2^11 of the largest of its 128 channels
(`pack` checks). What remains, one power of two per row and 128 channels, multiplies the fp32 partial product together with the
activations' scale: the matrix units never sum more than 128 channels, whose FP8 accumulation is short of fp32.

FP8 experts lie in rows, as in the checkpoint. MXFP4 ones lie in tiles of 128 rows x 128 channels (`pack` makes them), 8 KiB in one
piece: two halves [128 rows, 32 bytes], half h holding channel groups 2h and 2h + 1. In each 4 bytes lie channels c..c+3 of both
groups: nibble i of the low 16 bits is the magnitude of channel c + i of group 2h, nibble i of the high 16 bits that of group 2h + 1;
bit 8 i + 3 is the sign of the former, bit 8 i + 7 of the latter. `words` has an int32 per row and tile: bits 4 g..4 g + 3 the exponent
of group g (2..13, biased so that e4m3's 1.0 is 7), bits 16..23 the ue8m0 byte of what remains.
"""

from __future__ import annotations

import triton
import triton.language as tl

from engine.ops.moe_experts.triton_route import place_of
from engine.ops.triton_rounding import INTERPRETED, quantize, round_bf16, to_bf16
from engine.ops.triton_splits import is_last

BLOCK = tl.constexpr(128)


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
def partial(tiles_ptr, words_ptr, expert, place, tile, k, x, num_tiles, k_tiles, PLACES: tl.constexpr, FP4: tl.constexpr):
    """One tile of weights [128, 128] times x [128, M]: fp32 [128, M], scaled but for the activations' scale. x: as `load_x` has it."""
    row = tl.arange(0, BLOCK)
    if FP4:
        index = ((expert * num_tiles + tile) * k_tiles + k) * PLACES + place
        words = tl.load(words_ptr + index * BLOCK + row)
        tile_ptr = tiles_ptr + index * (BLOCK * BLOCK // 2)
        if INTERPRETED:
            a0, a1 = decode_portable(tile_ptr, words[:, None], 0)
            a2, a3 = decode_portable(tile_ptr, words[:, None], 1)
        else:
            packed = tile_ptr + row[:, None] * 32 + tl.arange(0, 32)[None, :]
            a0, a1 = decode(tl.load(packed), words[:, None], 0)
            a2, a3 = decode(tl.load(packed + BLOCK * 32), words[:, None], 1)
        out = tl.dot(a0, x[0])
        out = tl.dot(a1, x[1], out)
        out = tl.dot(a2, x[2], out)
        out = tl.dot(a3, x[3], out)
        out = out * (((words >> 16) & 255) << 23).to(tl.float32, bitcast=True)[:, None]
    else:
        n_tile = (expert * PLACES + place) * num_tiles + tile
        weight_row = tiles_ptr + (n_tile * BLOCK + row[:, None]) * (k_tiles * BLOCK) + tl.arange(0, BLOCK)[None, :]
        out = tl.dot(tl.load(weight_row + k * BLOCK), x[0]) * tl.load(words_ptr + n_tile * k_tiles + k)
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


@triton.jit(do_not_specialize=["num_blocks"])
def moe_hidden_kernel(
    codes_ptr,
    scales_ptr,
    tiles_ptr,
    words_ptr,
    pairs_ptr,
    block_expert_ptr,
    listed_ptr,
    weights_ptr,
    hidden_ptr,
    hidden_scales_ptr,
    scratch_ptr,
    arrived_ptr,
    num_blocks,
    num_tiles,
    k_tiles,
    top_k,
    scale_row_stride,
    scale_group_stride,
    scale_expert_gap,
    limit,
    BLOCK_M: tl.constexpr,
    GROUP_BLOCKS: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    SPLITS: tl.constexpr,
    FP4: tl.constexpr,
    WEIGHTED: tl.constexpr,
    LOOPS: tl.constexpr,
):
    """hidden[slot] = quantised clamped SwiGLU(w1 x, w3 x), times the weight of the slot's pair where they have weights, for one block of
    slots and 128 channels. Scales of x lie `scale_expert_gap` further for each expert than their rows' number says.

    With SPLITS > 1 that many programs share K: few experts alone would leave multiprocessors idle. With LOOPS there are `listed` blocks,
    and each program goes on to the one `num_blocks` further; else programs are as many as blocks, and those without an expert end."""
    first, tile = place_of(num_blocks, num_tiles, GROUP_BLOCKS)
    if not LOOPS:
        expert = tl.load(block_expert_ptr + first)
        if expert < 0:
            return
    # A loop only where it has more than one turn: it takes registers.
    for turn in (range if LOOPS else tl.static_range)(tl.cdiv(tl.load(listed_ptr) - first, num_blocks) if LOOPS else 1):
        block = first + turn * num_blocks
        if LOOPS:
            expert = tl.load(block_expert_ptr + block)
        expert = expert.to(tl.int64)
        pairs = tl.load(pairs_ptr + block * BLOCK_M + tl.arange(0, BLOCK_M))
        tokens = (tl.maximum(pairs, 0) // top_k).to(tl.int64)
        x_rows = tokens * (k_tiles * BLOCK)
        gate = tl.zeros([BLOCK, BLOCK_M], tl.float32)
        up = tl.zeros([BLOCK, BLOCK_M], tl.float32)
        split = tl.program_id(1)
        scale_at = scales_ptr + tokens * scale_row_stride + expert * scale_expert_gap
        scale = tl.load(scale_at + k_tiles * split // SPLITS * scale_group_stride)
        for k in tl.range(k_tiles * split // SPLITS, k_tiles * (split + 1) // SPLITS, num_stages=NUM_STAGES):
            x = load_x(codes_ptr + k * BLOCK, x_rows, FP4)
            next_scale = tl.load(scale_at + tl.minimum(k + 1, k_tiles - 1) * scale_group_stride)
            gate += partial(tiles_ptr, words_ptr, expert, 0, tile, k, x, num_tiles, k_tiles, 2, FP4) * scale[None, :]
            up += partial(tiles_ptr, words_ptr, expert, 1, tile, k, x, num_tiles, k_tiles, 2, FP4) * scale[None, :]
            scale = next_scale
        real = pairs[None, :] >= 0
        if SPLITS > 1:
            part = tl.arange(0, BLOCK)[:, None] + tl.arange(0, BLOCK_M)[None, :] * BLOCK
            size: tl.constexpr = 2 * BLOCK * BLOCK_M
            own = scratch_ptr + tl.program_id(0).to(tl.int64) * (SPLITS * size) + part
            tl.store(own + split * size, gate, mask=real)
            tl.store(own + split * size + size // 2, up, mask=real)
            real = real & is_last(arrived_ptr + tl.program_id(0), SPLITS)
            gate = tl.zeros([BLOCK, BLOCK_M], tl.float32)
            up = tl.zeros([BLOCK, BLOCK_M], tl.float32)
            for other in tl.static_range(SPLITS):
                gate += tl.load(own + other * size, mask=real, other=0.0, cache_modifier=".cg")
                up += tl.load(own + other * size + size // 2, mask=real, other=0.0, cache_modifier=".cg")
        gate = tl.minimum(round_bf16(gate), limit)
        up = tl.minimum(tl.maximum(round_bf16(up), -limit), limit)
        hidden = gate / (1.0 + tl.exp(-gate)) * up
        if WEIGHTED:
            hidden = hidden * tl.load(weights_ptr + tl.maximum(pairs, 0))[None, :]
        out, out_scale = quantize(round_bf16(hidden), 0)
        row = (block.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M))[None, :] * num_tiles + tile
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
    listed_ptr,
    out_ptr,
    scratch_ptr,
    arrived_ptr,
    num_blocks,
    num_tiles,
    k_tiles,
    width,
    out_stride,
    BLOCK_M: tl.constexpr,
    GROUP_BLOCKS: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    SPLITS: tl.constexpr,
    FP4: tl.constexpr,
    LOOPS: tl.constexpr,
    TILES: tl.constexpr,
):
    """out[pair] = w2 hidden[slot], bf16, for one block of slots and TILES times 128 channels, which take x once. Slots without a pair read
    the first of their block. SPLITS, LOOPS: as in moe_hidden_kernel; TILES is 1 or 2, 1 where SPLITS is not."""
    first, tile = place_of(num_blocks, num_tiles // TILES, GROUP_BLOCKS)
    tile *= TILES
    if not LOOPS:
        expert = tl.load(block_expert_ptr + first)
        if expert < 0:
            return
    # A loop only where it has more than one turn: it takes registers.
    for turn in (range if LOOPS else tl.static_range)(tl.cdiv(tl.load(listed_ptr) - first, num_blocks) if LOOPS else 1):
        block = first + turn * num_blocks
        if LOOPS:
            expert = tl.load(block_expert_ptr + block)
        expert = expert.to(tl.int64)
        pairs = tl.load(pairs_ptr + block * BLOCK_M + tl.arange(0, BLOCK_M))
        row = block.to(tl.int64) * BLOCK_M + tl.where(pairs >= 0, tl.arange(0, BLOCK_M), 0)
        total = tl.zeros([BLOCK, BLOCK_M], tl.float32)
        second = tl.zeros([BLOCK, BLOCK_M], tl.float32)
        split = tl.program_id(1)
        scale = tl.load(hidden_scales_ptr + row * k_tiles + k_tiles * split // SPLITS)
        for k in tl.range(k_tiles * split // SPLITS, k_tiles * (split + 1) // SPLITS, num_stages=NUM_STAGES):
            x = load_x(hidden_ptr + k * BLOCK, row * (k_tiles * BLOCK), FP4)
            next_scale = tl.load(hidden_scales_ptr + row * k_tiles + tl.minimum(k + 1, k_tiles - 1))
            part = partial(tiles_ptr, words_ptr, expert, 0, tile, k, x, num_tiles, k_tiles, 1, FP4)
            total += part * scale[None, :]
            if TILES == 2:
                second += partial(tiles_ptr, words_ptr, expert, 0, tile + 1, k, x, num_tiles, k_tiles, 1, FP4) * scale[None, :]
            scale = next_scale
        real = pairs >= 0
        if SPLITS > 1:
            size: tl.constexpr = BLOCK * BLOCK_M
            own = scratch_ptr + tl.program_id(0).to(tl.int64) * (SPLITS * size)
            own += tl.arange(0, BLOCK)[:, None] + tl.arange(0, BLOCK_M)[None, :] * BLOCK
            tl.store(own + split * size, total, mask=real[None, :])
            real = real & is_last(arrived_ptr + tl.program_id(0), SPLITS)
            total = tl.zeros([BLOCK, BLOCK_M], tl.float32)
            for other in tl.static_range(SPLITS):
                total += tl.load(own + other * size, mask=real[None, :], other=0.0, cache_modifier=".cg")
        channel = tile * BLOCK + tl.arange(0, BLOCK)
        out = tl.trans(to_bf16(total))
        out_row = out_ptr + tl.maximum(pairs, 0).to(tl.int64)[:, None] * out_stride
        tl.store(out_row + channel[None, :], out, mask=real[:, None] & (channel[None, :] < width))
        if TILES == 2:
            channel += BLOCK
            tl.store(out_row + channel[None, :], tl.trans(to_bf16(second)), mask=real[:, None] & (channel[None, :] < width))


_FP8, _I32, _WIDE = "*fp8e4nv", "*i32", "i32:16"
_PRODUCT = {"pairs_ptr": _I32, "block_expert_ptr": _I32, "listed_ptr": _I32, "num_blocks": "i32", "num_tiles": _WIDE, "k_tiles": _WIDE}
_PRODUCT |= {"hidden_ptr": _FP8, "hidden_scales_ptr": "*fp32", "scratch_ptr": "*fp32", "arrived_ptr": _I32}
_HIDDEN = {**_PRODUCT, "codes_ptr": _FP8, "scales_ptr": "*fp32", "weights_ptr": "*fp32", "top_k": "i32", "limit": "fp32"}
_HIDDEN |= dict.fromkeys(("scale_row_stride", "scale_group_stride", "scale_expert_gap"), "i32")
_OUT = {**_PRODUCT, "out_ptr": "*bf16", "width": _WIDE, "out_stride": _WIDE}


_KINDS = ((True, 16, 1), (True, 16, 4), (True, 32, 1), (False, 16, 1))


def _variants(kernel, signature, kinds=_KINDS, **form):
    for fp4, block_m, splits in kinds:
        constexprs = {"BLOCK_M": block_m, "GROUP_BLOCKS": 1, "NUM_STAGES": 3, "SPLITS": splits, "FP4": fp4, **form}
        weight = {"tiles_ptr": "*u8", "words_ptr": _I32} if fp4 else {"tiles_ptr": _FP8, "words_ptr": "*fp32"}
        types = {name: kind for name, kind in {**signature, **weight}.items() if name not in form}
        yield kernel, types, constexprs, {"num_warps": 4}


AOT = [
    *_variants(moe_hidden_kernel, _HIDDEN, WEIGHTED=True, LOOPS=False, scale_group_stride=1),
    *_variants(moe_hidden_kernel, _HIDDEN, _KINDS[:1], WEIGHTED=False, LOOPS=True, scale_row_stride=1, top_k=1),
    *_variants(moe_out_kernel, _OUT, LOOPS=False, TILES=1),
    *_variants(moe_out_kernel, _OUT, (_KINDS[0], _KINDS[2]), LOOPS=False, TILES=2),
    *_variants(moe_out_kernel, _OUT, _KINDS[2:3], LOOPS=True, TILES=2),
]

"""Routed experts, whatever the routing: no host synchronisation, a grid that depends on shapes only, no atomics on values.

Few rows an expert: four launches, experts read at 4 bits (triton_few.py).
1 route    lists each expert's (token, place) pairs in blocks, and quantises x to FP8
2 hidden   w1 and w3, clamped SwiGLU, routing weight, FP8 again; one block of pairs and 128 channels a program
3 out      w2, rounded to bf16, one row a pair
4 sum      a token's rows in fp32, in order

Many rows: MXFP4 is widened to FP8 in a workspace, and products and SwiGLU are launches of their own (triton_many.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from core.errors import ConfigError
from engine.model.quantized import FP4_GROUP, FP8_BLOCK, QuantizedWeight, Weight, exp2_of_byte
from engine.ops.moe_experts.triton_few import moe_hidden_kernel, moe_out_kernel
from engine.ops.moe_experts.triton_many import moe_act_kernel, moe_many_kernel, moe_widen_kernel
from engine.ops.moe_experts.triton_route import moe_route_kernel, moe_sum_kernel

ONE = 7
"""Exponent bits of 1.0 in e4m3."""
LOWEST, HIGHEST = 2, 13
"""Exponent bits that a group may have: 0.5 is a normal number, and 6 is finite."""
LOWEST_WIDE = -1
"""The same after widening: multiples of 0.5 are multiples of e4m3's least subnormal number."""


@dataclass(frozen=True, slots=True)
class Tiles:
    """Matrices [E, N, K], both padded with zeros to multiples of 128, in tiles of 128 x 128."""

    codes: torch.Tensor
    """MXFP4: uint8 [E, N / 128, K / 128, M, 8192] as triton_few.py describes; FP8: e4m3 [E, N / 128, K / 128, M, 128 * 128].
    M = 2 where w1 and w3 lie side by side, else 1."""
    words: torch.Tensor
    """int32. MXFP4: exponents [E, N / 128, K / 128, M, 128]; FP8: bits of the fp32 scale [E, N / 128, K / 128, M]."""


@dataclass(frozen=True, slots=True)
class PackedExperts:
    w13: Tiles
    w2: Tiles
    fp4: bool
    width: int
    """d."""
    arrived: torch.Tensor
    """int32 [MOST_SPLIT_TILES], zeros between calls: programs that have finished their part of a split tile."""
    widens: bool
    """Whether MXFP4 tiles are exact in FP8 with one scale each; else the kernels for few rows serve any number."""


@dataclass(frozen=True, slots=True)
class Few:
    """Tiles of the kernels for few rows, chosen by rows an expert has on average (tests/benchmarks/results)."""

    block_m: int
    group_blocks: int
    stages: int
    splits: int = 1
    warps: int = 4


@dataclass(frozen=True, slots=True)
class Many:
    """Tiles of the kernels for many rows."""

    block_m: int
    group_blocks: int
    stages: int
    warps: int


MANY_ROWS = 112
"""Rows an expert from which widening pays."""
MOST_SPLIT_BLOCKS = 64
MOST_SPLIT_TILES = MOST_SPLIT_BLOCKS * 64
"""64 tiles of 128 rows: an output of 8,192 channels."""


def choose(num_pairs: int, experts: PackedExperts) -> Few | Many:
    num_experts, rows = len(experts.w13.codes), num_pairs / len(experts.w13.codes)
    if rows >= MANY_ROWS and experts.widens:
        return Many(128, 8, 3, 8)
    if rows > 16:
        return Few(32, 2, 4)
    few_blocks = min(num_pairs, num_experts) + num_pairs // 16 <= MOST_SPLIT_BLOCKS
    return Few(16, 1, 3, (4 if num_pairs <= 12 else 2) if few_blocks else 1)


def run(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, experts: PackedExperts, limit: float) -> torch.Tensor:
    """As the reference, x in bf16."""
    return run_with(x, ids, weights, experts, limit, choose(ids.numel(), experts))


def run_with(
    x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, experts: PackedExperts, limit: float, config: Few | Many
) -> torch.Tensor:
    (tokens, top_k), width, device = ids.shape, experts.width, x.device
    out = torch.empty(tokens, width, dtype=torch.float32, device=device)
    if not ids.numel():
        return out
    x, ids, weights = x.contiguous(), ids.contiguous(), weights.contiguous()
    routed = _route(x, ids, experts, config.block_m)
    rows = torch.empty(tokens * top_k, width, dtype=torch.bfloat16, device=device)
    if isinstance(config, Few):
        _few(routed, ids, weights, experts, limit, config, rows)
    else:
        _many(routed, ids, weights, experts, limit, config, rows)
    channels = min(1024, triton.next_power_of_2(width))
    grid = (tokens, triton.cdiv(width, channels))
    moe_sum_kernel[grid](rows, ids, out, len(experts.w13.codes), width, TOP_K=top_k, CHANNELS=channels, num_warps=4)
    return out


@dataclass(frozen=True, slots=True)
class _Routed:
    codes: torch.Tensor
    """e4m3 [T, K']."""
    scales: torch.Tensor
    """fp32 [T, K' / 128]."""
    pairs: torch.Tensor
    """int32 [max_blocks * block_m]: token * top_k + place, blocks of one expert; -1 where a block is not full."""
    block_expert: torch.Tensor
    """int32 [max_blocks], -1 behind the last."""


def _route(x: torch.Tensor, ids: torch.Tensor, experts: PackedExperts, block_m: int) -> _Routed:
    tokens, pairs, device = len(x), ids.numel(), x.device
    num_experts, _, x_tiles = experts.w13.codes.shape[:3]
    max_blocks = min(pairs, num_experts) + pairs // block_m
    codes = torch.empty(tokens, x_tiles * FP8_BLOCK, dtype=torch.float8_e4m3fn, device=device)
    scales = torch.empty(tokens, x_tiles, dtype=torch.float32, device=device)
    block_pairs = torch.empty(max_blocks * block_m, dtype=torch.int32, device=device)
    block_expert = torch.empty(max_blocks, dtype=torch.int32, device=device)
    groups = min(8, triton.next_power_of_2(x_tiles))
    chunk = 4096 if pairs > 4096 else min(1024, max(32, triton.next_power_of_2(pairs)))
    moe_route_kernel[(num_experts + tokens * triton.cdiv(x_tiles, groups),)](
        ids,
        x,
        codes,
        scales,
        block_pairs,
        block_expert,
        pairs,
        num_experts,
        max_blocks,
        x.shape[1],
        x_tiles * FP8_BLOCK,
        PADDED_E=triton.next_power_of_2(num_experts + 1),
        BLOCK_M=block_m,
        CHUNK=chunk,
        GROUPS=groups,
        num_warps=8 if chunk > 1024 else 4,
    )
    return _Routed(codes, scales, block_pairs, block_expert)


def _few(
    routed: _Routed, ids: torch.Tensor, weights: torch.Tensor, experts: PackedExperts, limit: float, config: Few, rows: torch.Tensor
) -> None:
    """Fills rows: bf16 [pairs, d]."""
    _, hidden_tiles, x_tiles = experts.w13.codes.shape[:3]
    out_tiles, max_blocks, device = experts.w2.codes.shape[1], len(routed.block_expert), rows.device
    hidden = torch.empty(len(rows), hidden_tiles * FP8_BLOCK, dtype=torch.float8_e4m3fn, device=device)
    hidden_scales = torch.empty(len(rows), hidden_tiles, dtype=torch.float32, device=device)
    parts = max_blocks * max(2 * hidden_tiles, out_tiles) * FP8_BLOCK * config.block_m * config.splits if config.splits > 1 else 1
    scratch = torch.empty(parts, dtype=torch.float32, device=device)
    tiles = {
        "BLOCK_M": config.block_m,
        "GROUP_BLOCKS": config.group_blocks,
        "NUM_STAGES": config.stages,
        "SPLITS": config.splits,
        "FP4": experts.fp4,
        "num_warps": config.warps,
    }
    moe_hidden_kernel[(max_blocks * hidden_tiles, config.splits)](
        routed.codes,
        routed.scales,
        experts.w13.codes,
        experts.w13.words,
        routed.pairs,
        routed.block_expert,
        weights,
        hidden,
        hidden_scales,
        scratch,
        experts.arrived,
        max_blocks,
        hidden_tiles,
        x_tiles,
        ids.shape[1],
        limit,
        **tiles,
    )
    moe_out_kernel[(max_blocks * out_tiles, config.splits)](
        hidden,
        hidden_scales,
        experts.w2.codes,
        experts.w2.words,
        routed.pairs,
        routed.block_expert,
        rows,
        scratch,
        experts.arrived,
        max_blocks,
        out_tiles,
        hidden_tiles,
        experts.width,
        **tiles,
    )


def _many(
    routed: _Routed, ids: torch.Tensor, weights: torch.Tensor, experts: PackedExperts, limit: float, config: Many, rows: torch.Tensor
) -> None:
    """Fills rows: bf16 [pairs, d]. Its workspace is one byte a weight for MXFP4, of w1 and w3 and then of w2."""
    hidden_tiles, device = experts.w13.codes.shape[1], rows.device
    gate_up = torch.empty(len(rows), 2 * hidden_tiles * FP8_BLOCK, dtype=torch.bfloat16, device=device)
    _product(routed, routed.codes, routed.scales, experts.w13, experts.fp4, gate_up, hidden_tiles * FP8_BLOCK, ids.shape[1], config)
    hidden = torch.empty(len(rows), hidden_tiles * FP8_BLOCK, dtype=torch.float8_e4m3fn, device=device)
    hidden_scales = torch.empty(len(rows), hidden_tiles, dtype=torch.float32, device=device)
    groups = min(16, triton.next_power_of_2(hidden_tiles))
    moe_act_kernel[(len(rows), triton.cdiv(hidden_tiles, groups))](
        gate_up, ids, weights, hidden, hidden_scales, len(experts.w13.codes), hidden_tiles, limit, GROUPS=groups, num_warps=4
    )
    _product(routed, hidden, hidden_scales, experts.w2, experts.fp4, rows, experts.width, 1, config)


def _product(
    routed: _Routed,
    codes: torch.Tensor,
    scales: torch.Tensor,
    weight: Tiles,
    fp4: bool,
    out: torch.Tensor,
    width: int,
    pairs_per_row: int,
    config: Many,
) -> None:
    num_experts, num_tiles, k_tiles, places = weight.codes.shape[:4]
    wide, wide_scales = weight.codes, weight.words.view(torch.float32)
    if fp4:
        shape = (num_experts, num_tiles, k_tiles, places)
        wide = torch.empty(*shape, FP8_BLOCK * FP8_BLOCK, dtype=torch.float8_e4m3fn, device=out.device)
        wide_scales = torch.empty(shape, dtype=torch.float32, device=out.device)
        moe_widen_kernel[(wide_scales.numel(),)](weight.codes, weight.words, wide, wide_scales, num_warps=4)
    max_blocks = len(routed.block_expert)
    moe_many_kernel[(max_blocks * num_tiles * places,)](
        codes,
        scales,
        wide,
        wide_scales,
        routed.pairs,
        routed.block_expert,
        out,
        max_blocks,
        num_tiles,
        k_tiles,
        pairs_per_row,
        width,
        PLACES=places,
        BLOCK_M=config.block_m,
        GROUP_BLOCKS=config.group_blocks,
        NUM_STAGES=config.stages,
        num_warps=config.warps,
    )


def pack(w1: list[Weight], w2: list[Weight], w3: list[Weight], quantize_activations: bool) -> PackedExperts:
    """As the reference's, on the device that the weights are on, expert by expert and without a float copy.

    Raises ConfigError for weights that are not MXFP4 or FP8, in float32 mode, and for group scales too far apart."""
    if not quantize_activations:
        raise ConfigError("engine.ops.moe_experts: backend 'triton' quantises activations; for float32 choose 'reference'")
    kinds = {weight.kind if isinstance(weight, QuantizedWeight) else "unquantised" for weight in (*w1, *w2, *w3)}
    if kinds not in ({"mxfp4"}, {"fp8"}):
        raise ConfigError(f"engine.ops.moe_experts: backend 'triton' takes experts that are all MXFP4 or all FP8, not {sorted(kinds)}")
    fp4 = kinds == {"mxfp4"}
    w13, first_widens = _pack_tiles([(gate, up) for gate, up in zip(w1, w3, strict=True)], fp4)
    w2_tiles, second_widens = _pack_tiles([(down,) for down in w2], fp4)
    arrived = torch.zeros(MOST_SPLIT_TILES, dtype=torch.int32, device=w13.codes.device)
    return PackedExperts(w13, w2_tiles, fp4, w2[0].shape[0], arrived, first_widens and second_widens)


def _pack_tiles(experts: list[tuple[QuantizedWeight, ...]], fp4: bool) -> tuple[Tiles, bool]:
    """The tiles, and whether they can be widened (triton_many.py)."""
    rows, columns = (-(-size // FP8_BLOCK) for size in experts[0][0].shape)
    shape, device = (len(experts), rows, columns, len(experts[0])), experts[0][0].data.device
    tile_bytes = FP8_BLOCK * FP8_BLOCK // (2 if fp4 else 1)
    codes = torch.empty(*shape, tile_bytes, dtype=torch.uint8 if fp4 else torch.float8_e4m3fn, device=device)
    words = torch.empty((*shape, FP8_BLOCK) if fp4 else shape, dtype=torch.int32, device=device)
    lowest = torch.full((2,), LOWEST, dtype=torch.int32, device=device)
    for expert, matrices in enumerate(experts):
        for place, matrix in enumerate(matrices):
            if fp4:
                codes[expert, :, :, place], words[expert, :, :, place], found = pack_mxfp4(matrix)
                lowest = torch.minimum(lowest, found)
            else:
                codes[expert, :, :, place], words[expert, :, :, place] = pack_fp8(matrix)
    in_row, in_tile = lowest.tolist()
    if in_row < LOWEST:
        raise ConfigError(
            "engine.ops.moe_experts: backend 'triton' needs MXFP4 group scales within 2^11 of each other in 128 channels of a row, "
            "and these experts have some farther apart; choose 'reference'"
        )
    return Tiles(codes, words), in_tile >= LOWEST_WIDE


def _tiled(matrix: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """[N, K] -> [N / rows, K / columns, rows, columns], padded with zeros."""
    height, width = matrix.shape
    matrix = torch.nn.functional.pad(matrix, (0, -width % columns, 0, -height % rows))
    return matrix.view(-(-height // rows), rows, -(-width // columns), columns).transpose(1, 2)


def pack_mxfp4(weight: QuantizedWeight) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(codes uint8 [N / 128, K / 128, 8192], words int32 [N / 128, K / 128, 128], int32 [2]: lowest exponent of a group that is not
    all zeros, relative to its row's scale in the tile, and to the tile's)."""
    packed = _tiled(weight.data, FP8_BLOCK, FP8_BLOCK // 2)
    codes = torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2).unflatten(-1, (2, 2, 8, 4))  # half, group of it, word, channel
    magnitude, sign = (codes & 7).to(torch.int32), (codes >> 3).to(torch.int32)
    place = torch.arange(4, dtype=torch.int32, device=codes.device)
    word = (magnitude[..., 0, :, :] << 4 * place).sum(-1) + (magnitude[..., 1, :, :] << 4 * place + 16).sum(-1)
    word += (sign[..., 0, :, :] << 8 * place + 3).sum(-1) + (sign[..., 1, :, :] << 8 * place + 7).sum(-1)
    tiles = word.to(torch.int32).transpose(2, 3).contiguous().view(torch.uint8).flatten(2)
    scale = _tiled(weight.scale, FP8_BLOCK, FP8_BLOCK // FP4_GROUP).to(torch.int32)
    is_zero = (magnitude == 0).flatten(-2).all(-1).flatten(-2)
    of_row = scale.masked_fill(is_zero, 0).amax(-1, keepdim=True)
    of_tile = of_row.amax(-2, keepdim=True)
    of_row = torch.where(is_zero.all(-1, keepdim=True), of_tile, of_row)
    base = (of_row - (HIGHEST - ONE)).clamp(min=1)
    exponent = torch.where(is_zero, HIGHEST, scale - base + ONE)
    in_tile = torch.where(is_zero, HIGHEST, exponent - (base.amax(-2, keepdim=True) - base))
    words = (exponent << 4 * place).sum(-1).to(torch.int32) + (base[..., 0] << 16)
    return tiles, words, torch.stack((exponent.amin(), in_tile.amin()))


def pack_fp8(weight: QuantizedWeight) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes e4m3 [N / 128, K / 128, 128 * 128], bits of the fp32 scale, int32 [N / 128, K / 128])."""
    tiles = _tiled(weight.data.view(torch.uint8), FP8_BLOCK, FP8_BLOCK).flatten(2).view(torch.float8_e4m3fn)
    return tiles, exp2_of_byte(weight.scale).view(torch.int32)

"""Routed experts in four launches, whatever the routing: no host synchronisation, a grid that depends on shapes only, no atomics.

1 route    lists each expert's (token, place) pairs in blocks, and quantises x to FP8
2 hidden   w1 and w3, clamped SwiGLU, routing weight, FP8 again; one block of pairs and 128 channels a program
3 out      w2, rounded to bf16, one row a pair
4 sum      a token's rows in fp32, in order

Experts stay as the checkpoint has them: MXFP4 at 4 bits, widened in registers (triton_kernels.py), or FP8.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from core.errors import ConfigError
from engine.model.quantized import FP4_GROUP, FP8_BLOCK, QuantizedWeight, Weight, exp2_of_byte
from engine.ops.moe_experts.triton_kernels import moe_hidden_kernel, moe_out_kernel, moe_route_kernel, moe_sum_kernel

ONE = 7
"""Exponent bits of 1.0 in e4m3."""
LOWEST, HIGHEST = 2, 13
"""Exponent bits that a group may have: 0.5 is a normal number, and 6 is finite."""


@dataclass(frozen=True, slots=True)
class Tiles:
    """Matrices [E, N, K], both padded with zeros to multiples of 128, in tiles of 128 x 128."""

    codes: torch.Tensor
    """MXFP4: uint8 [E, N / 128, K / 128, M, 8192] as triton_kernels.py describes; FP8: e4m3 [E, N / 128, K / 128, M, 128 * 128].
    M = 2 where w1 and w3 lie side by side, else 1."""
    words: torch.Tensor
    """int32 [E, N / 128, K / 128, M, 128]: MXFP4: exponents; FP8: bits of the fp32 scale."""


@dataclass(frozen=True, slots=True)
class PackedExperts:
    w13: Tiles
    w2: Tiles
    fp4: bool
    width: int
    """d."""


@dataclass(frozen=True, slots=True)
class Config:
    """Tile table, chosen by rows an expert has on average (tests/benchmarks/results)."""

    block_m: int
    group_blocks: int
    hidden_warps: int
    hidden_stages: int
    out_warps: int
    out_stages: int


def choose(num_pairs: int, num_experts: int) -> Config:
    rows = num_pairs / num_experts
    if rows <= 16:
        return Config(16, 1, 4, 4, 4, 5)
    if rows <= 48:
        return Config(32, 4, 4, 4, 4, 5)
    return Config(64, 8, 8, 3, 4, 4) if rows <= 96 else Config(128, 8, 8, 3, 8, 4)


def run(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, experts: PackedExperts, limit: float) -> torch.Tensor:
    """As the reference, x in bf16."""
    return run_with(x, ids, weights, experts, limit, choose(ids.numel(), len(experts.w13.codes)))


def run_with(
    x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, experts: PackedExperts, limit: float, config: Config
) -> torch.Tensor:
    tokens, top_k = ids.shape
    pairs, width, device, block_m = tokens * top_k, experts.width, x.device, config.block_m
    out = torch.empty(tokens, width, dtype=torch.float32, device=device)
    if not pairs:
        return out
    num_experts, hidden_tiles, x_tiles = experts.w13.codes.shape[:3]
    out_tiles = experts.w2.codes.shape[1]
    max_blocks = min(pairs, num_experts) + pairs // block_m
    fp8 = torch.float8_e4m3fn
    codes = torch.empty(tokens, x_tiles * FP8_BLOCK, dtype=fp8, device=device)
    scales = torch.empty(tokens, x_tiles, dtype=torch.float32, device=device)
    hidden = torch.empty(pairs, hidden_tiles * FP8_BLOCK, dtype=fp8, device=device)
    hidden_scales = torch.empty(pairs, hidden_tiles, dtype=torch.float32, device=device)
    rows = torch.empty(pairs, width, dtype=torch.bfloat16, device=device)
    block_pairs = torch.empty(max_blocks * block_m, dtype=torch.int32, device=device)
    block_expert = torch.empty(max_blocks, dtype=torch.int32, device=device)
    x, ids, weights = x.contiguous(), ids.contiguous(), weights.contiguous()
    groups = min(8, triton.next_power_of_2(x_tiles))
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
        width,
        x_tiles * FP8_BLOCK,
        PADDED_E=triton.next_power_of_2(num_experts + 1),
        BLOCK_M=block_m,
        CHUNK=min(1024, max(32, triton.next_power_of_2(pairs))),
        GROUPS=groups,
        num_warps=4,
    )
    moe_hidden_kernel[(max_blocks * hidden_tiles,)](
        codes,
        scales,
        experts.w13.codes,
        experts.w13.words,
        block_pairs,
        block_expert,
        weights,
        hidden,
        hidden_scales,
        max_blocks,
        hidden_tiles,
        x_tiles,
        top_k,
        limit,
        BLOCK_M=block_m,
        GROUP_BLOCKS=config.group_blocks,
        NUM_STAGES=config.hidden_stages,
        FP4=experts.fp4,
        num_warps=config.hidden_warps,
    )
    moe_out_kernel[(max_blocks * out_tiles,)](
        hidden,
        hidden_scales,
        experts.w2.codes,
        experts.w2.words,
        block_pairs,
        block_expert,
        rows,
        max_blocks,
        out_tiles,
        hidden_tiles,
        width,
        BLOCK_M=block_m,
        GROUP_BLOCKS=config.group_blocks,
        NUM_STAGES=config.out_stages,
        FP4=experts.fp4,
        num_warps=config.out_warps,
    )
    channels = min(1024, triton.next_power_of_2(width))
    moe_sum_kernel[(tokens, triton.cdiv(width, channels))](rows, ids, out, num_experts, width, TOP_K=top_k, CHANNELS=channels, num_warps=4)
    return out


def pack(w1: list[Weight], w2: list[Weight], w3: list[Weight], quantize_activations: bool) -> PackedExperts:
    """As the reference's, on the device that the weights are on, expert by expert and without a float copy.

    Raises ConfigError for weights that are not MXFP4 or FP8, in float32 mode, and for group scales too far apart."""
    if not quantize_activations:
        raise ConfigError("engine.ops.moe_experts: backend 'triton' quantises activations; for float32 choose 'reference'")
    kinds = {weight.kind if isinstance(weight, QuantizedWeight) else "unquantised" for weight in (*w1, *w2, *w3)}
    if kinds not in ({"mxfp4"}, {"fp8"}):
        raise ConfigError(f"engine.ops.moe_experts: backend 'triton' takes experts that are all MXFP4 or all FP8, not {sorted(kinds)}")
    fp4 = kinds == {"mxfp4"}
    w13 = _pack_tiles([(gate, up) for gate, up in zip(w1, w3, strict=True)], fp4)
    return PackedExperts(w13, _pack_tiles([(down,) for down in w2], fp4), fp4, w2[0].shape[0])


def _pack_tiles(experts: list[tuple[QuantizedWeight, ...]], fp4: bool) -> Tiles:
    rows, columns = (-(-size // FP8_BLOCK) for size in experts[0][0].shape)
    shape, device = (len(experts), rows, columns, len(experts[0])), experts[0][0].data.device
    tile_bytes = FP8_BLOCK * FP8_BLOCK // (2 if fp4 else 1)
    codes = torch.empty(*shape, tile_bytes, dtype=torch.uint8 if fp4 else torch.float8_e4m3fn, device=device)
    words = torch.empty(*shape, FP8_BLOCK, dtype=torch.int32, device=device)
    fits = torch.ones((), dtype=torch.bool, device=device)
    for expert, matrices in enumerate(experts):
        for place, matrix in enumerate(matrices):
            if fp4:
                codes[expert, :, :, place], words[expert, :, :, place], ok = pack_mxfp4(matrix)
                fits &= ok
            else:
                codes[expert, :, :, place], words[expert, :, :, place] = pack_fp8(matrix)
    if not bool(fits):
        raise ConfigError(
            "engine.ops.moe_experts: backend 'triton' needs MXFP4 group scales within 2^11 of each other in 128 channels of a row, "
            "and these experts have some farther apart; choose 'reference'"
        )
    return Tiles(codes, words)


def _tiled(matrix: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """[N, K] -> [N / rows, K / columns, rows, columns], padded with zeros."""
    height, width = matrix.shape
    matrix = torch.nn.functional.pad(matrix, (0, -width % columns, 0, -height % rows))
    return matrix.view(-(-height // rows), rows, -(-width // columns), columns).transpose(1, 2)


def pack_mxfp4(weight: QuantizedWeight) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(codes uint8 [N / 128, K / 128, 8192], words int32 [N / 128, K / 128, 128], whether all group scales fit)."""
    packed = _tiled(weight.data, FP8_BLOCK, FP8_BLOCK // 2)
    codes = torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2).unflatten(-1, (2, 2, 8, 4))  # half, group of it, word, channel
    magnitude, sign = (codes & 7).to(torch.int32), (codes >> 3).to(torch.int32)
    place = torch.arange(4, dtype=torch.int32, device=codes.device)
    word = (magnitude[..., 0, :, :] << 4 * place).sum(-1) + (magnitude[..., 1, :, :] << 4 * place + 16).sum(-1)
    word += (sign[..., 0, :, :] << 8 * place + 3).sum(-1) + (sign[..., 1, :, :] << 8 * place + 7).sum(-1)
    tiles = word.to(torch.int32).transpose(2, 3).contiguous().view(torch.uint8).flatten(2)
    scale = _tiled(weight.scale, FP8_BLOCK, FP8_BLOCK // FP4_GROUP).to(torch.int32)
    is_zero = (magnitude == 0).flatten(-2).all(-1).flatten(-2)
    largest = scale.masked_fill(is_zero, 0).amax(-1, keepdim=True)
    base = (largest - (HIGHEST - ONE)).clamp(min=1)
    exponent = torch.where(is_zero, HIGHEST, scale - base + ONE)
    fits = (exponent >= LOWEST).all() & (largest < 255).all()
    return tiles, (exponent << 4 * place).sum(-1).to(torch.int32) + (base[..., 0] << 16), fits


def pack_fp8(weight: QuantizedWeight) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes e4m3 [N / 128, K / 128, 128 * 128], words int32 [N / 128, K / 128, 128])."""
    tiles = _tiled(weight.data.view(torch.uint8), FP8_BLOCK, FP8_BLOCK).flatten(2).view(torch.float8_e4m3fn)
    bits = exp2_of_byte(weight.scale).view(torch.int32)
    return tiles, bits[..., None].expand(-1, -1, FP8_BLOCK)

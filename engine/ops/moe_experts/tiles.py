"""Experts packed for the kernels: MXFP4 in tiles of 128 x 128 at 4 bits (triton_few.py describes them), FP8 in rows.

Packing works expert by expert on the device that the weights are on, and makes no float copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from core.errors import ConfigError
from engine.model.quantized import FP4_GROUP, FP8_BLOCK, QuantizedWeight, Weight, exp2_of_byte

ONE = 7
"""Exponent bits of 1.0 in e4m3."""
LOWEST, HIGHEST = 2, 13
"""Exponent bits that a group may have: 0.5 is a normal number, and 6 is finite."""
LOWEST_WIDE = -1
"""The same after widening: multiples of 0.5 are multiples of e4m3's least subnormal number."""
MOST_SPLIT_BLOCKS = 64
MOST_SPLIT_TILES = MOST_SPLIT_BLOCKS * 64
"""64 tiles of 128 rows: an output of 8,192 channels."""


@dataclass(frozen=True, slots=True)
class Tiles:
    """Matrices [E, M, N, K]: M = 2 where w1 and w3 lie side by side, else 1; N and K padded with zeros to multiples of 128."""

    codes: torch.Tensor
    """MXFP4: uint8 [E, N / 128, K / 128, M, 8192]; FP8: e4m3 [E, M * N, K]."""
    scale: torch.Tensor
    """MXFP4: int32 [E, N / 128, K / 128, M, 128], exponents of a row in a tile; FP8: fp32 [E, M * N / 128, K / 128]."""
    num_tiles: int
    """N / 128."""
    k_tiles: int
    """K / 128."""
    places: int
    """M."""


@dataclass(frozen=True, slots=True)
class PackedExperts:
    w13: Tiles
    w2: Tiles
    fp4: bool
    width: int
    """d."""
    counters: torch.Tensor
    """int32 [MOST_SPLIT_TILES + 1], zeros between calls: `arrived`, then `taken`. In one piece, since a tensor with one entry would be one
    expert's for who puts an expert in the place of another (parallel/packed.py)."""
    widens: bool
    """Whether MXFP4 tiles are exact in FP8 with one scale each; else the kernels for few rows serve any number."""

    @property
    def arrived(self) -> torch.Tensor:
        """int32 [MOST_SPLIT_TILES]: programs that have finished their part of a split tile."""
        return self.counters[:MOST_SPLIT_TILES]

    @property
    def taken(self) -> torch.Tensor:
        """int32 [1]: blocks that experts have taken for their pairs."""
        return self.counters[MOST_SPLIT_TILES:]

    @property
    def num_experts(self) -> int:
        return len(self.w13.codes)

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tiles in (self.w13, self.w2) for tensor in (tiles.codes, tiles.scale))

    @property
    def widening_bytes(self) -> int | None:
        """How many more they take as FP8; None if they are not MXFP4, or not exact there."""
        if not (self.fp4 and self.widens):
            return None
        return sum(tiles.codes.nbytes - tiles.scale.nbytes + tiles.scale.nbytes // FP8_BLOCK for tiles in (self.w13, self.w2))


def pack_experts(w1: list[Weight], w2: list[Weight], w3: list[Weight], quantize_activations: bool) -> PackedExperts:
    """As the reference's, on the device that the weights are on, expert by expert and without a float copy.

    Raises ConfigError for weights that are not MXFP4 or FP8, in float32 mode, and for group scales too far apart."""
    if not quantize_activations:
        raise ConfigError("engine.ops.moe_experts: this backend quantises activations; for float32 choose 'reference'")
    quantized = [[weight for weight in weights if isinstance(weight, QuantizedWeight)] for weights in (w1, w2, w3)]
    kinds = {weight.kind for weights in quantized for weight in weights}
    if sum(map(len, quantized)) < len(w1) + len(w2) + len(w3) or len(kinds) != 1:
        raise ConfigError("engine.ops.moe_experts: this backend takes experts that are all MXFP4 or all FP8; for others choose 'reference'")
    fp4 = kinds == {"mxfp4"}
    gates, downs, ups = quantized
    w13, first_widens = _pack_tiles([(gate, up) for gate, up in zip(gates, ups, strict=True)], fp4)
    w2_tiles, second_widens = _pack_tiles([(down,) for down in downs], fp4)
    counters = torch.zeros(MOST_SPLIT_TILES + 1, dtype=torch.int32, device=w13.codes.device)
    return PackedExperts(w13, w2_tiles, fp4, downs[0].shape[0], counters, first_widens and second_widens)


def _pack_tiles(experts: Sequence[tuple[QuantizedWeight, ...]], fp4: bool) -> tuple[Tiles, bool]:
    """The tiles, and whether they can be widened (triton_many.py)."""
    (rows, columns), places = experts[0][0].shape, len(experts[0])
    num_tiles, k_tiles, device = -(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK), experts[0][0].data.device
    if not fp4:
        fp8 = torch.zeros(len(experts), places, num_tiles * FP8_BLOCK, k_tiles * FP8_BLOCK, dtype=torch.uint8, device=device)
        factors = torch.empty(len(experts), places, num_tiles, k_tiles, device=device)
        for expert, matrices in enumerate(experts):
            for place, matrix in enumerate(matrices):
                fp8[expert, place, :rows, :columns] = matrix.data.view(torch.uint8)
                factors[expert, place] = exp2_of_byte(matrix.scale)
        return Tiles(fp8.view(torch.float8_e4m3fn).flatten(1, 2), factors.flatten(1, 2), num_tiles, k_tiles, places), True
    shape = len(experts), num_tiles, k_tiles, places
    codes = torch.empty(*shape, FP8_BLOCK * FP8_BLOCK // 2, dtype=torch.uint8, device=device)
    words = torch.empty(*shape, FP8_BLOCK, dtype=torch.int32, device=device)
    lowest = torch.full((2,), LOWEST, dtype=torch.int32, device=device)
    for expert, matrices in enumerate(experts):
        for place, matrix in enumerate(matrices):
            codes[expert, :, :, place], words[expert, :, :, place], found = pack_mxfp4(matrix)
            lowest = torch.minimum(lowest, found)
    in_row, in_tile = lowest.tolist()
    if in_row < LOWEST:
        raise ConfigError(
            "engine.ops.moe_experts: this backend needs MXFP4 group scales within 2^11 of each other in 128 channels of a row, "
            "and these experts have some farther apart; choose 'reference'"
        )
    return Tiles(codes, words, num_tiles, k_tiles, places), in_tile >= LOWEST_WIDE


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

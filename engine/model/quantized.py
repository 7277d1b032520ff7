"""Weights in the two quantised formats of the published checkpoints, and their exact values (deepseek_v4.md, 4.2).

fp8     W[n, k] = e4m3 * 2^(byte - 127), one ue8m0 byte per 128 x 128 block (edge blocks may be partial)
mxfp4   two e2m1 codes a byte, even channel in the low nibble; one ue8m0 byte per 32 channels of a row
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from core.errors import ConfigError

FP8_BLOCK = 128
FP4_GROUP = 32
FP8_MAX = 448.0
SCALES_ALIGNED = 4
"""Scales of a column begin at multiples of so many (16 bytes), where bulk copies can read them."""
FP4_MAX = 6.0
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    kind: str
    """"fp8" or "mxfp4"."""
    data: torch.Tensor
    """fp8: float8_e4m3fn [N, K]. mxfp4: uint8 [N, K / 2]."""
    scale: torch.Tensor
    """uint8 exponents (ue8m0). fp8: [ceil(N / 128), ceil(K / 128)]. mxfp4: [N, K / 32]."""

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K) of the matrix."""
        rows, columns = self.data.shape
        return rows, columns * (2 if self.kind == "mxfp4" else 1)

    @property
    def num_bytes(self) -> int:
        return self.data.nbytes + self.scale.nbytes

    def to(self, device: torch.device) -> QuantizedWeight:
        return QuantizedWeight(self.kind, self.data.to(device), self.scale.to(device))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """[N, K]; exact in float32, and in bfloat16 too (both codes have at most 4 significant bits)."""
        return dequantize_fp8(self.data, self.scale, dtype) if self.kind == "fp8" else dequantize_mxfp4(self.data, self.scale, dtype)


@dataclass(frozen=True, slots=True)
class QuantizedRows:
    """Activations as FP8 products take them; rows may lie apart."""

    codes: torch.Tensor
    """float8_e4m3fn [T, K], K a multiple of 128."""
    scale: torch.Tensor
    """float32 [T, K / 128], powers of two."""
    dtype: torch.dtype
    """Of the rows before."""

    @classmethod
    def empty(cls, rows: int, channels: int, dtype: torch.dtype, device: torch.device) -> QuantizedRows:
        """Uninitialised, for `channels` filled up to a multiple of 128. Scales of a column lie together, as products of many rows read
        them."""
        groups = -(-channels // FP8_BLOCK)
        codes = torch.empty(rows, groups * FP8_BLOCK, dtype=torch.float8_e4m3fn, device=device)
        column = -(-rows // SCALES_ALIGNED) * SCALES_ALIGNED
        return cls(codes, torch.empty(groups, column, dtype=torch.float32, device=device).T[:rows], dtype)

    def __len__(self) -> int:
        return len(self.codes)

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def double(self) -> torch.Tensor:
        """float64 [T, K]."""
        return (self.codes.double().unflatten(-1, (-1, FP8_BLOCK)) * self.scale[..., None]).flatten(-2)


Weight = torch.Tensor | QuantizedWeight
"""A matrix as the checkpoint holds it."""


def to_float64(weight: Weight) -> torch.Tensor:
    """[N, K], the values unchanged."""
    return weight.dequantize(torch.float64) if isinstance(weight, QuantizedWeight) else weight.double()


def stack_rows(weights: Sequence[Weight]) -> Weight | None:
    """[N1 + N2 + ..., K] with the rows of all, the values unchanged; None if their formats or blocks do not allow it."""
    if len({weight.shape[1] for weight in weights}) > 1:
        return None
    plain = [weight for weight in weights if isinstance(weight, torch.Tensor)]
    quantized = [weight for weight in weights if isinstance(weight, QuantizedWeight)]
    if not quantized:
        return torch.cat(plain) if len({weight.dtype for weight in plain}) == 1 else None
    kinds = {weight.kind for weight in quantized}
    if plain or len(kinds) > 1 or (kinds == {"fp8"} and any(weight.shape[0] % FP8_BLOCK for weight in quantized[:-1])):
        return None
    data = torch.cat([weight.data.view(torch.uint8) for weight in quantized]).view(quantized[0].data.dtype)
    return QuantizedWeight(kinds.pop(), data, torch.cat([weight.scale for weight in quantized]))


def some_rows(weight: Weight, rows: slice) -> Weight:
    """[stop - start, K], copied so that the others need not stay. Raises ConfigError if that would cut an FP8 weight's blocks."""
    if isinstance(weight, torch.Tensor):
        return weight[rows].clone()
    scales = rows
    if weight.kind == "fp8":
        if rows.start % FP8_BLOCK or rows.stop % FP8_BLOCK:
            raise ConfigError(f"rows {rows.start} to {rows.stop} of an FP8 weight are to be used; they must be multiples of {FP8_BLOCK}")
        scales = slice(rows.start // FP8_BLOCK, rows.stop // FP8_BLOCK)
    return QuantizedWeight(weight.kind, weight.data.view(torch.uint8)[rows].clone().view(weight.data.dtype), weight.scale[scales].clone())


@functools.cache
def constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A small table on a device, made once (inside a CUDA graph it could not be). Not to be written to."""
    return torch.tensor(values, dtype=dtype, device=device)


EXP2_OF_BYTE = (*(2.0 ** (i - 127) for i in range(255)), math.nan)
FP4_OF_CODE = FP4_VALUES + tuple(-value for value in FP4_VALUES)


def exp2_of_byte(byte: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """2^(byte - 127). Byte 0 is 2^-127, byte 255 is NaN, as ue8m0 has it."""
    return constant(EXP2_OF_BYTE, dtype, byte.device)[byte.long()]


def ceil_exponent_byte(scale: torch.Tensor) -> torch.Tensor:
    """uint8 exponent of the smallest power of two >= scale (float32 > 0); torch's own cast would round to nearest."""
    bits = scale.to(torch.float32).view(torch.int32)
    exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0).to(torch.int32)
    return exponent.clamp(0, 254).to(torch.uint8)


def dequantize_fp8(data: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """data: e4m3 [N, K]; scale: uint8 [N / 128, K / 128], rounded up. Returns [N, K]."""
    rows, columns = data.shape
    factors = exp2_of_byte(scale, dtype).repeat_interleave(FP8_BLOCK, 0)[:rows].repeat_interleave(FP8_BLOCK, 1)[:, :columns]
    return data.to(dtype) * factors


def dequantize_mxfp4(data: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """data: uint8 [N, K / 2], the even channel in the low nibble; scale: uint8 [N, K / 32]. Returns [N, K]."""
    table = constant(FP4_OF_CODE, dtype, data.device)
    codes = torch.stack((data & 0xF, data >> 4), dim=-1).flatten(1)
    return table[codes.long()] * exp2_of_byte(scale, dtype).repeat_interleave(FP4_GROUP, 1)


def round_to_fp4(x: torch.Tensor) -> torch.Tensor:
    """Nearest e2m1 value, ties to the even code, saturating at 6. Same dtype as x."""
    magnitude = x.abs().clamp(max=FP4_MAX)
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0)).to(x.dtype)
    return torch.copysign((magnitude / step).round() * step, x)  # torch.round is half-to-even, and so are the codes


def quantize_fp8(weight: torch.Tensor) -> QuantizedWeight:
    """Nearest FP8 with the smallest power-of-two scale per 128 x 128 block that does not saturate. weight: float [N, K]."""
    rows, columns = weight.shape
    blocks = (-(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK))
    padded = weight.new_zeros(blocks[0] * FP8_BLOCK, blocks[1] * FP8_BLOCK, dtype=torch.float32)
    padded[:rows, :columns] = weight
    tiles = padded.view(blocks[0], FP8_BLOCK, blocks[1], FP8_BLOCK)
    scale = ceil_exponent_byte(tiles.abs().amax((1, 3)).clamp(min=1e-12) / FP8_MAX)
    scaled = (tiles / exp2_of_byte(scale)[:, None, :, None]).clamp(-FP8_MAX, FP8_MAX)
    data = scaled.view_as(padded)[:rows, :columns].to(torch.float8_e4m3fn)
    return QuantizedWeight("fp8", data.contiguous(), scale)


def quantize_mxfp4(weight: torch.Tensor) -> QuantizedWeight:
    """Nearest MXFP4 with the smallest power-of-two scale per 32 channels that does not saturate. weight: float [N, K], K % 32 == 0."""
    rows, columns = weight.shape
    groups = weight.to(torch.float32).view(rows, columns // FP4_GROUP, FP4_GROUP)
    scale = ceil_exponent_byte(groups.abs().amax(2).clamp(min=1e-12) / FP4_MAX)
    values = round_to_fp4(groups / exp2_of_byte(scale)[..., None]).view(rows, columns)
    table = constant(FP4_VALUES, torch.float32, weight.device)
    codes = torch.searchsorted(table, values.abs()).to(torch.uint8) | (torch.signbit(values).to(torch.uint8) << 3)
    return QuantizedWeight("mxfp4", codes[:, 0::2] | (codes[:, 1::2] << 4), scale)

"""Row formats: how one KV entry or one index key is stored as bytes (drawn in bytes.md).

A block of R rows is R data rows, then R scale rows. `encode` turns values into (data, scale) bytes, `decode` turns them back;
decode(encode(x)) is the value set that attention sees, in prefill and in decode alike, in `dtype`, which holds every value exactly.

Names: N rows, D width of a row in channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from core.errors import ConfigError
from engine.model.quantized import (
    FP4_GROUP,
    FP4_MAX,
    FP4_OF_CODE,
    FP4_VALUES,
    FP8_MAX,
    ceil_exponent_byte,
    constant,
    exp2_of_byte,
    round_to_fp4,
)

KV_FP8_GROUP = 64
"""Channels that share one power-of-two scale in an FP8 KV row."""
KV_NOPE, KV_ROPE = 448, 64
INDEX_DIM = 128
AMAX_FLOOR = 1e-4


@dataclass(frozen=True, slots=True)
class RowFormat:
    """`data_bytes` and `scale_bytes` per row; subclasses give the meaning."""

    width: int
    data_bytes: int
    scale_bytes: int
    dtype: torch.dtype
    """Of decoded values, all of which it holds exactly."""

    def encode(self, x_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """float [N, D] -> uint8 [N, data_bytes], uint8 [N, scale_bytes]."""
        raise NotImplementedError

    def decode(self, data: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """uint8 [..., data_bytes], uint8 [..., scale_bytes] -> [..., D] in `dtype`."""
        raise NotImplementedError

    def round_trip(self, x_ND: torch.Tensor) -> torch.Tensor:
        """The values that reading x back from the cache would give."""
        return self.decode(*self.encode(x_ND))


def _as_bytes(x: torch.Tensor) -> torch.Tensor:
    return x.flatten().view(torch.uint8).view(*x.shape[:-1], x.shape[-1] * x.itemsize)  # flat first: an empty tensor's strides may be 0


class PlainRows(RowFormat):
    """All channels in bfloat16 or float32, no scales."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        RowFormat.__init__(self, width, width * dtype.itemsize, 0, dtype)

    def encode(self, x_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return _as_bytes(x_ND.to(self.dtype)), x_ND.new_empty((len(x_ND), 0), dtype=torch.uint8)

    def decode(self, data: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return data.contiguous().view(self.dtype)


class Fp8KvRows(RowFormat):
    """584 B: 448 e4m3, 64 bfloat16; then 7 ue8m0 scales (groups of 64 channels) and a pad byte. FlashMLA's "V4" row."""

    def __init__(self) -> None:
        RowFormat.__init__(self, KV_NOPE + KV_ROPE, KV_NOPE + 2 * KV_ROPE, 8, torch.bfloat16)

    def encode(self, x_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = x_ND.to(torch.bfloat16)
        groups = x[:, :KV_NOPE].float().view(len(x), KV_NOPE // KV_FP8_GROUP, KV_FP8_GROUP)
        exponent = ceil_exponent_byte(groups.abs().amax(2).clamp(min=AMAX_FLOOR) / FP8_MAX)
        codes = (groups / exp2_of_byte(exponent)[..., None]).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
        data = torch.cat((_as_bytes(codes.view(len(x), KV_NOPE)), _as_bytes(x[:, KV_NOPE:])), dim=1)
        return data, torch.nn.functional.pad(exponent, (0, 1))

    def decode(self, data: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        nope = data[..., :KV_NOPE].contiguous().view(torch.float8_e4m3fn).float()
        nope = nope.unflatten(-1, (KV_NOPE // KV_FP8_GROUP, KV_FP8_GROUP)) * exp2_of_byte(scale[..., :7])[..., None]
        rope = data[..., KV_NOPE:].contiguous().view(torch.bfloat16)
        return torch.cat((nope.flatten(-2).to(torch.bfloat16), rope), dim=-1)


class Fp8IndexRows(RowFormat):
    """132 B: 128 e4m3 values, one float32 scale = max(amax, 1e-4) / 448 (not a power of two)."""

    def __init__(self) -> None:
        RowFormat.__init__(self, INDEX_DIM, INDEX_DIM, 4, torch.float32)

    def encode(self, x_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = x_ND.float()
        scale = x.abs().amax(1, keepdim=True).clamp(min=AMAX_FLOOR) / FP8_MAX
        return _as_bytes((x / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)), _as_bytes(scale)

    def decode(self, data: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return data.contiguous().view(torch.float8_e4m3fn).float() * scale.contiguous().view(torch.float32)


class Fp4IndexRows(RowFormat):
    """68 B: 64 bytes of e2m1 pairs (even channel low), 4 ue8m0 scales (groups of 32 channels)."""

    def __init__(self) -> None:
        RowFormat.__init__(self, INDEX_DIM, INDEX_DIM // 2, INDEX_DIM // FP4_GROUP, torch.bfloat16)

    def encode(self, x_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        groups = x_ND.float().view(len(x_ND), INDEX_DIM // FP4_GROUP, FP4_GROUP)
        exponent = ceil_exponent_byte(groups.abs().amax(2).clamp(min=FP4_MAX * 2.0**-126) / FP4_MAX)
        values = round_to_fp4(groups / exp2_of_byte(exponent)[..., None]).flatten(1)
        table = constant(FP4_VALUES, torch.float32, x_ND.device)
        codes = torch.searchsorted(table, values.abs()).to(torch.uint8) | (torch.signbit(values).to(torch.uint8) << 3)
        return codes[:, 0::2] | (codes[:, 1::2] << 4), exponent

    def decode(self, data: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        table = constant(FP4_OF_CODE, torch.float32, data.device)
        values = table[torch.stack((data & 0xF, data >> 4), dim=-1).flatten(-2).long()]
        return (values.unflatten(-1, (INDEX_DIM // FP4_GROUP, FP4_GROUP)) * exp2_of_byte(scale)[..., None]).flatten(-2).to(torch.bfloat16)


def kv_rows(kv_format: str, head_dim: int, rope_dim: int) -> RowFormat:
    """The row of window and compressed entries for `engine.kv_format`. Raises ConfigError if the shape does not fit."""
    if kv_format == "fp8":
        if (head_dim, rope_dim) != (KV_NOPE + KV_ROPE, KV_ROPE):
            raise ConfigError(
                f"engine.kv_format fp8 needs head_dim 512 and rope dim 64, the model has {head_dim} and {rope_dim}; use bf16 or fp32"
            )
        return Fp8KvRows()
    return PlainRows(head_dim, torch.bfloat16 if kv_format == "bf16" else torch.float32)


def index_rows(index_format: str, index_head_dim: int) -> RowFormat:
    """The row of index keys for `engine.index_format`. Raises ConfigError if the shape does not fit."""
    if index_format in ("fp8", "fp4"):
        if index_head_dim != INDEX_DIM:
            raise ConfigError(
                f"engine.index_format {index_format} needs index_head_dim 128, the model has {index_head_dim}; use bf16 or fp32"
            )
        return Fp8IndexRows() if index_format == "fp8" else Fp4IndexRows()
    return PlainRows(index_head_dim, torch.bfloat16 if index_format == "bf16" else torch.float32)

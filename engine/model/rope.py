"""Rotary position embedding: interleaved pairs over the last channels (deepseek_v4.md, 1.2, 2.2 and 6).

The angle is the float32 product float32(position) * float32(frequency), as the model was trained; its cosine and sine are
then taken accurately. At positions near 1,000,000 another order of rounding turns the vectors by up to 0.013 rad.
"""

from __future__ import annotations

import math

import torch

from engine.config import ModelConfig


def main_frequencies(model: ModelConfig) -> torch.Tensor:
    """float32 [rope / 2]: layers with window attention only, and MTP."""
    return _base_frequencies(model.rope_theta, model.qk_rope_head_dim).float()


def compress_frequencies(model: ModelConfig) -> torch.Tensor:
    """float32 [rope / 2] with YaRN: layers with compressed entries. No attention factor."""
    dim = model.qk_rope_head_dim
    frequencies = _base_frequencies(model.compress_rope_theta, dim)

    def pair_of(rotations: float) -> float:
        """The pair that makes this many rotations over the original context."""
        return dim * math.log(model.rope_original_max_positions / (rotations * 2 * math.pi)) / (2 * math.log(model.compress_rope_theta))

    low = max(math.floor(pair_of(model.rope_beta_fast)), 0)
    high = min(math.ceil(pair_of(model.rope_beta_slow)), dim - 1)
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)).clamp(0, 1)
    keep = 1 - ramp
    return frequencies.float() / model.rope_factor * (1 - keep) + frequencies.float() * keep


def _base_frequencies(theta: float, dim: int) -> torch.Tensor:
    return 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)


Rotation = tuple[torch.Tensor, torch.Tensor]
"""Cosine and sine, float32 [T, rope / 2]."""


def rotation(positions: torch.Tensor, frequencies: torch.Tensor) -> Rotation:
    """Cosine and sine, float32 [T, rope / 2], of int64 positions [T]."""
    angle = (positions.float()[:, None] * frequencies).double()
    return angle.cos().float(), angle.sin().float()


def rotate(x64: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, inverse: bool = False) -> torch.Tensor:
    """Rotate the last 2 * cos.shape[-1] channels of float64 x [T, ..., D]; cos and sin are [T, rope / 2]. Returns a new tensor."""
    rope = 2 * cos.shape[-1]
    shape = (len(cos),) + (1,) * (x64.dim() - 2) + (rope // 2,)
    c, s = cos.double().view(shape), sin.double().view(shape)
    if inverse:
        s = -s
    head, tail = x64[..., :-rope], x64[..., -rope:].unflatten(-1, (-1, 2))
    even, odd = tail[..., 0], tail[..., 1]
    turned = torch.stack((even * c - odd * s, even * s + odd * c), dim=-1).flatten(-2)
    return torch.cat((head, turned), dim=-1)

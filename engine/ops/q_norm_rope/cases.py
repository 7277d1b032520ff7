"""q_norm_rope: 64 (Flash) and 128 (Pro) heads of 512, and the demo model's small heads. Also the angles for other ops' cases."""

from __future__ import annotations

import torch

from engine.model.rope import rotation
from engine.ops.cases import Bench, Case, Draw, generator, randn

EPS = 1e-6
REASON = "norm and rotation in fp32: beside a rounding boundary of bf16 a value falls on its other side"


def angles(device: torch.device, seed: int, tokens: int, rope: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine at positions up to a million."""
    positions = torch.randint(0, 2**20, (tokens,), generator=generator(device, seed), device=device)
    return rotation(positions, 1e4 ** (-torch.arange(0, rope, 2, device=device) / rope))


def _draw(tokens: int, heads: int, dim: int = 512, rope: int = 64, dtype: torch.dtype = torch.bfloat16) -> Draw:
    def draw(device: torch.device, seed: int) -> tuple[object, ...]:
        return randn(device, seed, tokens, heads, dim, dtype=dtype), *angles(device, seed + 1, tokens, rope), EPS

    return draw


CASES = (
    Case("no tokens", _draw(0, 64), 1e-3, REASON, small=True),
    Case("small heads in fp32", _draw(3, 5, 64, 16, torch.float32), 1e-6, REASON, small=True),
    Case("one token in fp32", _draw(1, 9, dtype=torch.float32), 1e-6, REASON, small=True),
    Case("one token", _draw(1, 64), 1e-3, REASON),
    Case("Pro batch", _draw(33, 128), 1e-3, REASON),
    Case("prefill", _draw(1025, 64), 1e-3, REASON),
)


def _bench(tokens: int, heads: int) -> Bench:
    return Bench(f"T={tokens} H={heads}", _draw(tokens, heads), tokens * (2 * heads * 512 * 2 + 64 * 4))


BENCH = tuple(_bench(tokens, heads) for tokens, heads in ((1, 64), (32, 64), (128, 64), (128, 128), (8192, 64), (4096, 128)))

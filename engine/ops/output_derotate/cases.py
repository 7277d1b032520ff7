"""output_derotate at the shapes of q_norm_rope. A backend may change its input, hence fresh arguments for each call."""

from __future__ import annotations

import torch

from engine.ops.cases import Bench, Case, Draw, randn
from engine.ops.q_norm_rope.cases import angles

REASON = "the rotation in fp32: beside a rounding boundary of bf16 a value falls on its other side"


def _draw(tokens: int, heads: int, dim: int = 512, rope: int = 64, dtype: torch.dtype = torch.bfloat16) -> Draw:
    def draw(device: torch.device, seed: int) -> tuple[object, ...]:
        return randn(device, seed, tokens, heads, dim, dtype=dtype), *angles(device, seed + 1, tokens, rope)

    return draw


CASES = (
    Case("no tokens", _draw(0, 64), 1e-4, REASON, small=True),
    Case("small heads in fp32", _draw(3, 5, 64, 16, torch.float32), 1e-6, REASON, small=True),
    Case("one token in fp32", _draw(1, 9, dtype=torch.float32), 1e-6, REASON, small=True),
    Case("one token", _draw(1, 64), 1e-4, REASON),
    Case("Pro batch", _draw(33, 128), 1e-4, REASON),
    Case("prefill", _draw(1025, 64), 1e-4, REASON),
)


def _bench(tokens: int, heads: int) -> Bench:
    """Bytes of the rope channels alone: nothing else has to move."""
    return Bench(f"T={tokens} H={heads}", _draw(tokens, heads), tokens * (2 * heads * 64 * 2 + 64 * 4))


BENCH = tuple(_bench(tokens, heads) for tokens, heads in ((1, 64), (128, 64), (128, 128), (8192, 64)))

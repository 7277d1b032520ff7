"""hc_post at the shapes of hc_pre."""

from __future__ import annotations

import torch

from engine.ops.cases import Bench, Case, Draw, randn
from engine.ops.hc_pre.cases import STREAMS, last_gates

REASON = "fp32 sums of five products: beside a rounding boundary of the streams' dtype they fall on its other side"


def _draw(tokens: int, dim: int, dtype: torch.dtype = torch.bfloat16) -> Draw:
    def draw(device: torch.device, seed: int) -> tuple[object, ...]:
        y = randn(device, seed, tokens, dim, dtype=dtype)
        return y, randn(device, seed + 1, tokens, STREAMS, dim, dtype=dtype), *last_gates(device, seed + 2, tokens)

    return draw


CASES = (
    Case("no tokens", _draw(0, 256), 1e-3, REASON, small=True),
    Case("fp32", _draw(3, 48, torch.float32), 1e-6, REASON, small=True),
    Case("one token", _draw(1, 4096), 1e-3, REASON),
    Case("Pro prefill", _draw(1025, 7168), 1e-3, REASON),
)


def _bench(tokens: int, dim: int) -> Bench:
    return Bench(f"T={tokens} d={dim}", _draw(tokens, dim), tokens * ((2 * STREAMS + 1) * dim * 2 + (STREAMS + STREAMS * STREAMS) * 4))


BENCH = tuple(_bench(tokens, dim) for tokens, dim in ((1, 4096), (128, 4096), (8192, 4096), (8192, 7168)))

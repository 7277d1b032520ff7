"""hc_head: the rows of a batch whose logits are wanted."""

from __future__ import annotations

import torch

from engine.ops.cases import Bench, Case, Draw, randn
from engine.ops.hc_pre.cases import EPS, GATES, HC_EPS, REASON, STREAMS, parameters


def _draw(tokens: int, dim: int, dtype: torch.dtype = torch.bfloat16) -> Draw:
    def draw(device: torch.device, seed: int) -> tuple[object, ...]:
        return randn(device, seed, tokens, STREAMS, dim, dtype=dtype), *parameters(device, seed + 1, dim, STREAMS), EPS, HC_EPS

    return draw


CASES = (
    Case("no tokens", _draw(0, 256), 1e-3, REASON, small=True),
    Case("fp32", _draw(3, 48, torch.float32), GATES, REASON, small=True),
    Case("one token", _draw(1, 4096), 1e-3, REASON),
    Case("Pro batch", _draw(130, 7168), 1e-3, REASON),
    Case("logits of a prompt", _draw(2000, 4096), 1e-3, REASON),
)


def _bench(tokens: int, dim: int) -> Bench:
    return Bench(f"T={tokens} d={dim}", _draw(tokens, dim), tokens * (STREAMS + 1) * dim * 2 + STREAMS * STREAMS * dim * 4)


BENCH = (_bench(1, 4096), _bench(128, 4096), _bench(8192, 4096))

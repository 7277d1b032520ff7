"""The output projection's groups at V4 shapes: 8 of [1024, 4096] (Flash), 16 (Pro)."""

from __future__ import annotations

import torch

from engine.ops.cases import Bench, Case, Draw, Weights, randn


def _drawn(tokens: int, groups: int, rows: int, columns: int) -> Draw:
    def draw(device: torch.device, seed: int) -> tuple[object, ...]:
        weight = randn(device, seed + 1, groups, rows, columns, dtype=torch.bfloat16, scale=columns**-0.5)
        return randn(device, seed, tokens, groups, columns, dtype=torch.bfloat16), Weights((weight,))

    return draw


def _case(name: str, *sizes: int, small: bool = False) -> Case:
    return Case(name, _drawn(*sizes), 3e-3, "bf16 operands, fp32 sums, one rounding to bf16 (2^-9) of either side", small)


CASES = (
    _case("no tokens", 0, 2, 16, 32, small=True),
    _case("one token", 1, 8, 1024, 4096),
    _case("Flash decode", 33, 8, 1024, 4096),
    _case("Pro decode", 4, 16, 1024, 4096),
    _case("Flash prefill", 1000, 8, 1024, 4096),
    _case("demo model", 5, 2, 64, 1024),
)


def _bench(tokens: int) -> Bench:
    size = 8 * 1024 * 4096
    return Bench(f"T={tokens} G=8 N=1024 K=4096", _drawn(tokens, 8, 1024, 4096), 2 * (size + tokens * 8 * 5120), 2 * tokens * size, "bf16")


BENCH = (_bench(1), _bench(32), _bench(128), _bench(4096))

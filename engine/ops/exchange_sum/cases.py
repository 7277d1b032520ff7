"""exchange_sum: of one rank, two, and four; Flash (4,096 channels) and Pro (7,168)."""

from __future__ import annotations

import torch

from engine.ops.cases import Bench, Case, Draw, randn

REASON = "the same additions in the same order"


def _draw(tokens: int, width: int, ranks: int, rank: int) -> Draw:
    """What is said to be undefined is NaN."""

    def draw(device: torch.device, seed: int) -> tuple[object, ...]:
        others = randn(device, seed, ranks, tokens, width, dtype=torch.bfloat16)
        others[rank] = torch.nan
        return randn(device, seed + 1, tokens, width, dtype=torch.bfloat16), others, rank

    return draw


CASES = (
    Case("no tokens", _draw(0, 64, 2, 0), 0.0, REASON, small=True),
    Case("one rank", _draw(3, 64, 1, 0), 0.0, REASON, small=True),
    Case("two ranks", _draw(5, 1000, 2, 1), 0.0, REASON, small=True),
    Case("four ranks", _draw(5, 1000, 4, 2), 0.0, REASON, small=True),
    Case("Flash", _draw(1031, 4096, 2, 0), 0.0, REASON),
    Case("Pro on eight", _draw(300, 7168, 8, 7), 0.0, REASON),
)


def _bench(tokens: int, width: int, ranks: int) -> Bench:
    return Bench(f"T={tokens} d={width} ranks={ranks}", _draw(tokens, width, ranks, 0), tokens * width * (2 * ranks + 4))


BENCH = (_bench(8192, 4096, 2), _bench(8192, 4096, 4), _bench(8192, 7168, 8))

"""prompt_indices: no entries, fewer than a block of them, Flash (512 chosen) and Pro (1,024), and the dense ones of ratio 128."""

from __future__ import annotations

import torch

from engine.ops.cases import Bench, Case, Draw, generator

REASON = "integers"


def _draw(tokens: int, count: int) -> Draw:
    def draw(device: torch.device, seed: int) -> tuple[object, ...]:
        def ints(number: int, low: int, *shape: int) -> torch.Tensor:
            return torch.randint(low, 5000, shape, generator=generator(device, seed + number), device=device, dtype=torch.int32)

        return ints(0, -1, tokens, 128), ints(1, -2000, tokens, count + 3)[:, :count].clamp(min=-1), ints(2, 0, tokens)

    return draw


CASES = (
    Case("no tokens", _draw(0, 8), 0.0, REASON, small=True),
    Case("no entries", _draw(5, 0), 0.0, REASON, small=True),
    Case("one entry", _draw(17, 1), 0.0, REASON, small=True),
    Case("two blocks", _draw(33, 200), 0.0, REASON, small=True),
    Case("Flash", _draw(1031, 512), 0.0, REASON),
    Case("Pro", _draw(300, 1024), 0.0, REASON),
)


def _bench(tokens: int, count: int) -> Bench:
    return Bench(f"T={tokens} K={count}", _draw(tokens, count), tokens * 4 * (2 * 128 + 2 * count + 1))


BENCH = (_bench(8192, 512), _bench(8192, 1024))

"""exchange_unpack_fp8: rows of several ranks, some with no expert here; Flash (4,096 channels) and Pro (7,168)."""

from __future__ import annotations

import torch

from engine.ops.cases import Bench, Case, Draw, generator
from engine.ops.exchange_pack_fp8 import row_words

REASON = "bits are moved"
TOP_K = 6


def _draw(rows: int, width: int, slots_per_rank: int, rank: int, top_k: int = TOP_K) -> Draw:
    """Of four ranks; small integers as bits of values and weights, which are no NaN of either format."""

    def draw(device: torch.device, seed: int) -> tuple[object, ...]:
        words = row_words(width, top_k)
        message = torch.randint(-1, 4 * slots_per_rank, (rows, words), generator=generator(device, seed), device=device)
        first = width // 4 + width // 128
        message[:, :first] = message[:, :first].clamp(min=0)
        message[:, first + top_k :] = message[:, first + top_k :].clamp(min=0)
        return message.int(), width, top_k, rank, slots_per_rank

    return draw


CASES = (
    Case("no rows", _draw(0, 128, 4, 0), 0.0, REASON, small=True),
    Case("one row", _draw(1, 128, 4, 1), 0.0, REASON, small=True),
    Case("odd sizes", _draw(11, 384, 3, 2, top_k=5), 0.0, REASON, small=True),
    Case("Flash", _draw(2, 4096, 64, 3), 0.0, REASON),
    Case("Flash prompt", _draw(2100, 4096, 72, 0), 0.0, REASON),
    Case("Pro prompt", _draw(512, 7168, 96, 3), 0.0, REASON),
)


def _bench(rows: int, width: int) -> Bench:
    """Values stay where they are."""
    return Bench(f"R={rows} d={width}", _draw(rows, width, 64, 1), rows * TOP_K * (8 + 8 + 4))


BENCH = (_bench(2048, 4096), _bench(16384, 4096), _bench(16384, 7168))

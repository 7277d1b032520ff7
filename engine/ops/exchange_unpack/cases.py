"""exchange_unpack: rows of several ranks, some with no expert here; Flash (4,096 channels) and Pro (7,168)."""

from __future__ import annotations

import torch

from engine.ops.cases import Bench, Case, Draw, generator

REASON = "bits are moved"
TOP_K = 6


def _draw(rows: int, width: int, slots_per_rank: int, rank: int, dtype: torch.dtype = torch.bfloat16, top_k: int = TOP_K) -> Draw:
    """Of four ranks; any 32 bits as values."""

    def draw(device: torch.device, seed: int) -> tuple[object, ...]:
        words = width * dtype.itemsize // 4
        message = torch.randint(-(2**30), 2**30, (rows, words + 2 * top_k), generator=generator(device, seed), device=device)
        slots = torch.randint(-1, 4 * slots_per_rank, (rows, top_k), generator=generator(device, seed + 1), device=device)
        message[:, words : words + top_k] = slots
        return message.int(), top_k, rank, slots_per_rank, dtype

    return draw


CASES = (
    Case("no rows", _draw(0, 64, 4, 0), 0.0, REASON, small=True),
    Case("one row", _draw(1, 64, 4, 1), 0.0, REASON, small=True),
    Case("odd sizes in fp32", _draw(11, 33, 3, 2, torch.float32, top_k=5), 0.0, REASON, small=True),
    Case("Flash", _draw(2, 4096, 64, 3), 0.0, REASON),
    Case("Flash batch", _draw(262, 4096, 72, 0), 0.0, REASON),
    Case("Pro batch", _draw(512, 7168, 96, 3), 0.0, REASON),
)


def _bench(rows: int, width: int) -> Bench:
    return Bench(f"R={rows} d={width}", _draw(rows, width, 64, 1), rows * (2 * width * 2 + TOP_K * (8 + 8 + 4)))


BENCH = (_bench(2, 4096), _bench(64, 4096), _bench(256, 4096), _bench(256, 7168))

"""pool_rows: windows and entries of pages in each row format, at a distance as in the arena."""

from __future__ import annotations

import torch

from engine.cache.rows import Fp8KvRows, PlainRows, RowFormat
from engine.ops.cases import Bench, Case, Draw, generator
from engine.ops.paged_cases import random_pool

REASON = "every value of the format is one of its dtype"
FP8 = Fp8KvRows()
BF16 = PlainRows(512, torch.bfloat16)
SMALL = PlainRows(64, torch.float32)


def _draw(count: int, form: RowFormat, units: int = 3, rows: int = 64) -> Draw:
    def draw(device: torch.device, seed: int) -> tuple[object, ...]:
        place = torch.randint(units * rows, (count,), generator=generator(device, seed), device=device)
        return random_pool(device, seed + 1, form, units, rows), place // rows, place % rows

    return draw


CASES = (
    Case("no rows", _draw(0, FP8), 0.0, REASON, small=True),
    Case("fp8", _draw(7, FP8), 0.0, REASON, small=True),
    Case("bf16", _draw(5, BF16, rows=2), 0.0, REASON, small=True),
    Case("small heads in fp32", _draw(9, SMALL, rows=128), 0.0, REASON, small=True),
    Case("fp8 of many pages", _draw(2050, FP8, units=40), 0.0, REASON),
    Case("bf16 of many pages", _draw(1025, BF16, units=20), 0.0, REASON),
)


def _bench(count: int, form: RowFormat) -> Bench:
    num_bytes = count * (form.data_bytes + form.scale_bytes + 16 + form.width * form.dtype.itemsize)
    return Bench(f"N={count} {'fp8' if form is FP8 else 'bf16'}", _draw(count, form, units=count // 64), num_bytes)


BENCH = (_bench(2048, FP8), _bench(32768, FP8), _bench(32768, BF16))

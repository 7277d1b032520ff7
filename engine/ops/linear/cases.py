"""Plain linears: router (fp32 out), compressors, the indexer's weights, a group of wo_a, and the head."""

from __future__ import annotations

import torch

from engine.ops.cases import Bench, Case, Draw, Weights, randn

BF16, FP32 = torch.bfloat16, torch.float32
ROUNDED = "results are rounded to bf16, half a step of few values differently"
SUMMED = "fp32 accumulators in place of float64"


def _draw(rows: int, n: int, k: int, out: torch.dtype, dtype: torch.dtype = BF16, weight: torch.dtype = BF16) -> Draw:
    def draw(device: torch.device, seed: int) -> tuple[object, ...]:
        return randn(device, seed, rows, k, dtype=dtype), Weights((randn(device, seed + 1, n, k, dtype=weight, scale=k**-0.5),)), out

    return draw


def _batched(device: torch.device, seed: int) -> tuple[object, ...]:
    return randn(device, seed, 3, 5, 256, dtype=BF16), Weights((randn(device, seed + 1, 64, 256, dtype=BF16),)), BF16


CASES = (
    Case("no rows", _draw(0, 24, 128, FP32), 2e-3, ROUNDED, small=True),
    Case("three dims", _batched, 2e-3, ROUNDED, small=True),
    Case("few outputs", _draw(5, 24, 200, FP32), 1e-5, SUMMED, small=True),
    Case("one row", _draw(1, 101, 1024, FP32), 1e-5, SUMMED, small=True),
    Case("one row of odd sizes", _draw(1, 25, 200, BF16), 2e-3, ROUNDED, small=True),
    Case("Flash router of one row", _draw(1, 256, 4096, FP32), 1e-5, SUMMED),
    Case("compressors of one row", _draw(1, 2560, 4096, FP32), 1e-5, SUMMED),
    Case("Pro router of one row", _draw(1, 384, 7168, FP32), 1e-5, SUMMED),
    Case("split", _draw(3, 100, 1024, BF16), 2e-3, ROUNDED, small=True),
    Case("fp32", _draw(5, 24, 256, FP32, dtype=FP32, weight=FP32), 1e-5, SUMMED, small=True),
    Case("weight of float64 values that bf16 lacks", _draw(5, 24, 256, FP32, weight=torch.float64), 1e-5, SUMMED),
    Case("bf16 rows, fp32 weight", _draw(5, 24, 256, BF16, weight=FP32), 2e-3, ROUNDED),
    Case("Flash router", _draw(17, 256, 4096, FP32), 1e-5, SUMMED),
    Case("Pro router chunk", _draw(2048, 384, 7168, FP32), 1e-5, SUMMED),
    Case("indexer weights", _draw(32, 64, 4096, BF16), 2e-3, ROUNDED),
    Case("compressor", _draw(300, 1024, 4096, FP32), 1e-5, SUMMED),
    Case("group of wo_a", _draw(64, 1024, 4096, BF16), 2e-3, ROUNDED),
    Case("head", _draw(4, 129280, 1024, FP32), 1e-5, SUMMED),
)


def _bench(name: str, rows: int, n: int, k: int, out: torch.dtype) -> Bench:
    num_bytes = n * k * 2 + rows * k * 2 + rows * n * out.itemsize
    return Bench(f"{name} T={rows}", _draw(rows, n, k, out), num_bytes, 2 * rows * n * k, "bf16")


BENCH = (
    *(_bench("router", rows, 256, 4096, FP32) for rows in (1, 32, 8192)),
    *(_bench("compressor c128", rows, 1024, 4096, FP32) for rows in (1, 32)),
    *(_bench("compressors c4", rows, 2560, 4096, FP32) for rows in (1, 32, 8192)),
    *(_bench("wo_a group", rows, 1024, 4096, BF16) for rows in (1, 32)),
    *(_bench("head", rows, 129280, 4096, FP32) for rows in (1, 32, 128)),
)

"""FP8 linears of V4-Flash and V4-Pro: attention projections, indexer queries, shared expert; one row to a prefill chunk."""

from __future__ import annotations

import torch

from engine.model.quantized import QuantizedRows
from engine.ops.cases import Bench, Case, Draw, Weights, randn
from engine.ops.fp8_linear import quantize_rows
from engine.ops.moe_experts.cases import fp8

REASON = "bf16 results, half a step of few values; FP8 products accumulate 128 channels with 13 bits below the largest"
TOLERANCE = 3e-3


def _draw(rows: int, n: int, k: int, spread: float = 1.0) -> Draw:
    def draw(device: torch.device, seed: int) -> tuple[object, ...]:
        return randn(device, seed, rows, k, dtype=torch.bfloat16, scale=spread), Weights((fp8(device, seed + 1, n, k),))

    return draw


def _outliers(rows: int, n: int, k: int) -> Draw:
    """One channel in 50 is 200 times larger, one row is all zeros, one is exactly 448."""

    def draw(device: torch.device, seed: int) -> tuple[object, ...]:
        x = randn(device, seed, rows, k)
        x[:, ::50] *= 200
        x[1], x[2] = 0, 448
        return x.bfloat16(), Weights((fp8(device, seed + 1, n, k),))

    return draw


def _quantized(rows: int, n: int, k: int, is_laid_out: bool = True) -> Draw:
    """x as the op before leaves it; or with the scales of a row together."""

    def draw(device: torch.device, seed: int) -> tuple[object, ...]:
        x, weight = _draw(rows, n, k)(device, seed)
        assert isinstance(x, torch.Tensor)
        values, laid_out = quantize_rows(x), QuantizedRows.empty(rows, k, x.dtype, device)
        laid_out.codes.copy_(values.codes)
        laid_out.scale.copy_(values.scale)
        return laid_out if is_laid_out else values, weight

    return draw


def _batched(device: torch.device, seed: int) -> tuple[object, ...]:
    return randn(device, seed, 2, 3, 128, dtype=torch.bfloat16), Weights((fp8(device, seed + 1, 128, 128),))


def _case(name: str, draw: Draw, small: bool = False) -> Case:
    return Case(name, draw, TOLERANCE, REASON, small)


CASES = (
    _case("no rows", _draw(0, 256, 256), small=True),
    _case("one row", _draw(1, 128, 1024), small=True),
    _case("one row of odd sizes", _draw(1, 100, 200), small=True),
    _case("two rows, split K", _draw(2, 128, 1024), small=True),
    _case("odd sizes", _draw(5, 100, 200), small=True),
    _case("odd sizes, many rows", _draw(70, 100, 200), small=True),
    _case("outliers", _outliers(5, 128, 384), small=True),
    _case("three dims", _batched, small=True),
    _case("no rows, quantised", _quantized(0, 256, 256), small=True),
    _case("one row, quantised", _quantized(1, 128, 1024), small=True),
    _case("one row, quantised, channels in turns", _quantized(1, 128, 3072), small=True),
    _case("few rows, quantised", _quantized(5, 128, 1024), small=True),
    _case("odd sizes, quantised", _quantized(3, 100, 200), small=True),
    _case("many rows, quantised", _quantized(70, 100, 200), small=True),
    _case("one row, quantised, laid out by rows", _quantized(1, 128, 1024, is_laid_out=False), small=True),
    _case("few rows, quantised, laid out by rows", _quantized(5, 128, 1024, is_laid_out=False), small=True),
    _case("wq_b batch 32, quantised", _quantized(32, 32768, 1024)),
    _case("wq_b batch 129, quantised", _quantized(129, 32768, 1024)),
    _case("wq_a and wkv one row, quantised", _quantized(1, 1536, 4096)),
    _case("wq_b one row, quantised", _quantized(1, 32768, 1024)),
    _case("shared w1_w3 one row, quantised", _quantized(1, 4096, 4096)),
    _case("shared w2 one row, quantised", _quantized(1, 4096, 2048)),
    _case("shared w2 chunk, quantised", _quantized(1023, 4096, 2048)),
    _case("wq_a", _draw(1, 1024, 4096)),
    _case("shared w1_w3", _draw(1, 4096, 4096)),
    _case("shared w2", _draw(1, 4096, 2048)),
    _case("wo_b two rows", _draw(2, 4096, 8192)),
    _case("Pro wq_a", _draw(1, 1536, 7168)),
    _case("wq_b batch 33", _draw(33, 32768, 1024)),
    _case("wkv", _draw(17, 512, 4096)),
    _case("wo_b batch 64", _draw(64, 4096, 8192)),
    _case("Pro wo_b", _draw(8, 7168, 16384)),
    _case("small values", _draw(9, 2048, 4096, spread=1e-6)),
    _case("65 rows", _draw(65, 2048, 4096)),
    _case("outliers in many rows", _outliers(300, 4096, 2048)),
    _case("chunk", _draw(2048, 4096, 8192)),
    _case("chunk of odd length", _draw(1023, 1536, 7168)),
)


def _bench(name: str, rows: int, n: int, k: int, is_quantized: bool = False) -> Bench:
    draw, label = (_quantized, ", quantised") if is_quantized else (_draw, "")
    return Bench(f"{name} [{n}, {k}] T={rows}{label}", draw(rows, n, k), n * k + rows * (n + k) * 2, 2 * rows * n * k, "fp8")


BENCH = (
    *(_bench("wq_a", rows, 1024, 4096) for rows in (1, 32)),
    *(_bench("wq_b", rows, 32768, 1024) for rows in (1, 16, 32, 64)),
    *(_bench("wo_b", rows, 4096, 8192) for rows in (1, 16, 32, 64, 128)),
    *(_bench("w2 shared", rows, 4096, 2048) for rows in (1, 32)),
    *(_bench("wo_b", rows, 4096, 8192) for rows in (256, 512, 1024, 2048, 8192)),
    _bench("wq_b", 8192, 32768, 1024),
    _bench("wq_a | wkv", 1, 1536, 4096, is_quantized=True),
    _bench("wq_b", 1, 32768, 1024, is_quantized=True),
    _bench("indexer's wq_b", 1, 8192, 1024, is_quantized=True),
    _bench("w1 | w3 shared", 1, 4096, 4096, is_quantized=True),
    _bench("w2 shared", 1, 4096, 2048, is_quantized=True),
    *(_bench("wq_a | wkv", rows, 1536, 4096) for rows in (1, 32, 8192)),
    *(_bench("w1 | w3 shared", rows, 4096, 4096) for rows in (1, 32, 8192)),
    *(_bench("Pro wq_b", rows, 65536, 1536) for rows in (1, 32, 8192)),
    *(_bench("Pro wo_b", rows, 7168, 16384) for rows in (1, 32, 8192)),
)

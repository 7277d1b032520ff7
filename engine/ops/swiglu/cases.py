"""SwiGLU of the shared expert: I = 2048 (V4-Flash) and 3072 (V4-Pro), clamped at 10."""

from __future__ import annotations

import torch

from engine.ops.cases import Bench, Case, Draw, randn

LIMIT = 10.0


def _draw(rows: int, width: int, dtype: torch.dtype, out_dtype: torch.dtype, halves: bool = False, spread: float = 8.0) -> Draw:
    def draw(device: torch.device, seed: int) -> tuple[object, ...]:
        both = randn(device, seed, rows, 2 * width, dtype=dtype, scale=spread)
        gate, up = both.chunk(2, dim=1)
        return (gate, up, LIMIT, out_dtype) if halves else (gate.contiguous(), up.contiguous(), LIMIT, out_dtype)

    return draw


def _quantized(rows: int, width: int) -> Draw:
    def draw(device: torch.device, seed: int) -> tuple[object, ...]:
        return *_draw(rows, width, BF16, BF16, halves=True)(device, seed), True

    return draw


def _case(name: str, draw: Draw, tolerance: float, small: bool = False) -> Case:
    reason = "rounded to bf16 after fp32 in place of float64: half a step of few values" if tolerance > 1e-5 else "fp32 in place of float64"
    return Case(name, draw, tolerance, reason, small)


BF16, FP32 = torch.bfloat16, torch.float32
CASES = (
    _case("no rows", _draw(0, 2048, FP32, BF16), 1e-3, small=True),
    _case("one row", _draw(1, 2048, FP32, BF16), 1e-3, small=True),
    _case("odd width, fp32", _draw(3, 100, FP32, FP32), 1e-6, small=True),
    _case("halves of one bf16 product", _draw(3, 1536, BF16, BF16, halves=True), 1e-3, small=True),
    _case("far beyond the limit", _draw(2, 256, FP32, FP32, spread=1e4), 1e-6, small=True),
    _case("no rows, quantised", _quantized(0, 256), 1e-3, small=True),
    _case("quantised", _quantized(3, 1536), 3e-3, small=True),
    _case("odd width, quantised", _quantized(5, 100), 3e-3, small=True),
    _case("Pro batch, quantised", _quantized(129, 3072), 3e-3),
    _case("Flash chunk", _draw(4096, 2048, FP32, BF16), 1e-3),
    _case("Pro batch", _draw(129, 3072, BF16, BF16, halves=True), 1e-3),
)


def _bench(rows: int, width: int) -> Bench:
    return Bench(f"T={rows} I={width} bf16", _draw(rows, width, BF16, BF16, halves=True), rows * width * 6)


BENCH = (_bench(32, 2048), _bench(128, 3072), _bench(8192, 2048))

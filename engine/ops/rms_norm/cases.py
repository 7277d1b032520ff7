"""rms_norm: latent queries (1024, 1536), hidden states (4096, 7168), the demo model (256)."""

from __future__ import annotations

import torch

from engine.ops.cases import Bench, Case, Draw, randn

EPS = 1e-6
REASON = "the sum of squares in fp32: beside a rounding boundary of bf16 a value falls on its other side"


def _draw(rows: int, width: int, dtype: torch.dtype = torch.bfloat16, weights: torch.dtype = torch.bfloat16, spread: float = 1.0) -> Draw:
    def draw(device: torch.device, seed: int) -> tuple[object, ...]:
        weight = (randn(device, seed + 1, width, scale=0.1) + 1).to(weights)
        return randn(device, seed, rows, width, dtype=dtype, scale=spread), weight, EPS

    return draw


def _quantized(rows: int, width: int) -> Draw:
    """The columns of a wider matrix, quantised."""

    def draw(device: torch.device, seed: int) -> tuple[object, ...]:
        x, weight, eps = _draw(rows, width + 128)(device, seed)
        assert isinstance(x, torch.Tensor) and isinstance(weight, torch.Tensor)
        return x[:, :width], weight[:width], eps, True

    return draw


def _three_dims(device: torch.device, seed: int) -> tuple[object, ...]:
    return randn(device, seed, 3, 5, 64), randn(device, seed + 1, 64), EPS


QUANTIZED = 3e-3
QUANTIZED_REASON = "the other side of a rounding boundary of bf16 may be that of one of FP8, a sixteenth away: few values"

CASES = (
    Case("no rows", _draw(0, 256), 1e-3, REASON, small=True),
    Case("fp32", _draw(3, 256, torch.float32, torch.float32), 1e-6, REASON, small=True),
    Case("three dims", _three_dims, 1e-6, REASON, small=True),
    Case("width that is no power of two", _draw(5, 1536, torch.float32), 1e-6, REASON, small=True),
    Case("small values", _draw(2, 256, torch.float32, spread=1e-4), 1e-6, REASON, small=True),
    Case("no rows, quantised", _quantized(0, 256), 1e-3, REASON, small=True),
    Case("quantised", _quantized(3, 256), QUANTIZED, QUANTIZED_REASON, small=True),
    Case("quantised, width that is no multiple", _quantized(5, 200), QUANTIZED, QUANTIZED_REASON, small=True),
    Case("one row, quantised", _quantized(1, 64), QUANTIZED, QUANTIZED_REASON, small=True),
    Case("latent queries, quantised", _quantized(129, 1024), QUANTIZED, QUANTIZED_REASON),
    Case("Pro latent queries, quantised", _quantized(33, 1536), QUANTIZED, QUANTIZED_REASON),
    Case("one row", _draw(1, 4096), 1e-3, REASON),
    Case("latent queries", _draw(129, 1024), 1e-3, REASON),
    Case("Pro hidden states", _draw(1001, 7168), 1e-3, REASON),
)


def _bench(rows: int, width: int) -> Bench:
    return Bench(f"rows={rows} K={width}", _draw(rows, width), (2 * rows + 1) * width * 2)


BENCH = tuple(_bench(rows, width) for rows, width in ((1, 1024), (128, 1024), (8192, 1024), (8192, 4096), (8192, 7168)))

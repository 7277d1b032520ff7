"""The output projection's groups at V4 shapes: 8 of [1024, 4096] (Flash), 16 (Pro)."""

from __future__ import annotations

import torch

from engine.model.quantized import quantize_fp8
from engine.ops.cases import Bench, Case, Draw, Weights, randn


def _drawn(tokens: int, groups: int, rows: int, columns: int, *, is_fp8: bool = True, is_wide: bool = False) -> Draw:
    def draw(device: torch.device, seed: int) -> tuple[object, ...]:
        plain = randn(device, seed + 1, groups * rows, columns, scale=columns**-0.5)
        weight = quantize_fp8(plain) if is_fp8 else plain.bfloat16()
        return randn(device, seed, tokens, groups, columns, dtype=torch.bfloat16), Weights((weight, groups), is_wide)

    return draw


def _case(name: str, *sizes: int, is_fp8: bool = True, is_wide: bool = False, small: bool = False) -> Case:
    return Case(
        name,
        _drawn(*sizes, is_fp8=is_fp8, is_wide=is_wide),
        5e-3,
        "bf16 operands, fp32 sums, one rounding to bf16: 2^-9, and 2^-8 where the interpreter truncates",
        small,
    )


CASES = (
    _case("no tokens", 0, 2, 128, 128, small=True),
    _case("one token of two groups", 1, 2, 128, 256, small=True),
    _case("one token", 1, 8, 1024, 4096),
    _case("few tokens, two blocks", 5, 2, 128, 256, small=True),
    _case("rows that are no whole block", 5, 2, 32, 256, small=True),
    _case("more tokens than are streamed", 513, 2, 128, 128, small=True),
    _case("few tokens, widened", 5, 2, 128, 128, is_wide=True, small=True),
    _case("more than few tokens, widened", 65, 2, 128, 128, is_wide=True, small=True),
    _case("plain weights", 7, 8, 1024, 4096, is_fp8=False),
    _case("Flash decode", 33, 8, 1024, 4096),
    _case("Flash decode of a large batch", 200, 8, 1024, 4096),
    _case("Flash decode of a large batch, widened", 200, 8, 1024, 4096, is_wide=True),
    _case("Pro decode", 4, 16, 1024, 4096),
    _case("Flash prefill", 1000, 8, 1024, 4096),
    _case("demo model", 5, 2, 64, 1024),
)


def _bench(tokens: int, groups: int = 8) -> Bench:
    size, name = groups * 1024 * 4096, f"T={tokens} G={groups} N=1024 K=4096"
    return Bench(name, _drawn(tokens, groups, 1024, 4096), size + 2 * tokens * groups * 5120, 2 * tokens * size, "bf16")


BENCH = (*(_bench(tokens) for tokens in (1, 32, 128, 512, 4096, 8192)), _bench(1, 16), _bench(8192, 16))

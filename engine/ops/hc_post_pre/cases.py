"""hc_post_pre at the shapes of hc_pre."""

from __future__ import annotations

import torch

from engine.ops.cases import Bench, Draw, randn
from engine.ops.hc_pre.cases import EPS, HC_EPS, ITERATIONS, OUTPUTS, STREAMS, case, last_gates, norm_weight, parameters


def _draw(
    tokens: int,
    dim: int,
    dtype: torch.dtype = torch.bfloat16,
    more: bool = False,
    part: torch.dtype = torch.float32,
    is_quantized: bool = False,
) -> Draw:
    """`part`: dtype of y where there is more."""

    def draw(device: torch.device, seed: int) -> tuple[object, ...]:
        y = randn(device, seed, tokens, dim, dtype=part if more else dtype)
        added = randn(device, seed + 8, tokens, dim, dtype=dtype) if more else None
        h = randn(device, seed + 1, tokens, STREAMS, dim, dtype=dtype)
        constants = norm_weight(device, seed + 7, dim), EPS, HC_EPS, ITERATIONS, is_quantized
        return y, added, h, *last_gates(device, seed + 2, tokens), *parameters(device, seed + 4, dim), *constants

    return draw


CASES = (
    case("no tokens", _draw(0, 256), small=True),
    case("one token in fp32", _draw(1, 256, torch.float32), small=True),
    case("odd width in fp32", _draw(3, 48, torch.float32), small=True),
    case("two parts in fp32", _draw(5, 48, torch.float32, more=True), small=True),
    case("two parts in fp32, quantised", _draw(5, 176, torch.float32, more=True, is_quantized=True), small=True),
    case("two parts, batch 33, quantised", _draw(33, 7168, more=True, is_quantized=True)),
    case("Flash prefill, quantised", _draw(4097, 4096, is_quantized=True)),
    case("two parts in bf16", _draw(5, 4096, more=True, part=torch.bfloat16)),
    case("two parts", _draw(1, 4096, more=True)),
    case("two parts, batch 33", _draw(33, 7168, more=True)),
    case("two parts, prefill", _draw(2049, 4096, more=True)),
    case("one token", _draw(1, 4096)),
    case("Pro one token", _draw(1, 7168)),
    case("demo batch", _draw(17, 256)),
    case("batch 33", _draw(33, 4096)),
    case("Pro batch 64", _draw(64, 7168)),
    case("batch 129", _draw(129, 4096)),
    case("Flash prefill", _draw(4097, 4096)),
    case("Pro prefill", _draw(1500, 7168)),
    case("fp32 prefill", _draw(300, 1024, torch.float32)),
)


def _bench(tokens: int, dim: int, more: bool = False) -> Bench:
    gates = 2 * tokens * (STREAMS + STREAMS * STREAMS) * 4
    num_bytes = tokens * (2 * STREAMS + (4 if more else 2)) * dim * 2 + OUTPUTS * STREAMS * dim * 4 + gates
    return Bench(f"T={tokens} d={dim}{' two parts' if more else ''}", _draw(tokens, dim, more=more), num_bytes)


BENCH = tuple(
    _bench(*shape)
    for shape in (
        (1, 4096),
        (8, 4096),
        (32, 4096),
        (64, 4096),
        (128, 4096),
        (1, 7168),
        (128, 7168),
        (1024, 4096),
        (8192, 4096),
        (8192, 7168),
        (1, 4096, True),
        (128, 4096, True),
        (8192, 4096, True),
    )
)

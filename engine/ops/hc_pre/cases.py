"""Hyper-connection shapes: V4-Flash (d 4096), V4-Pro (7168) and the demo model (256), one token to a prefill chunk.

Also what the cases of hc_post, hc_post_pre and hc_head are drawn from."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine.ops.cases import Bench, Case, Draw, Weights, randn, relative_error

STREAMS, OUTPUTS = 4, 24
EPS, HC_EPS, ITERATIONS = 1e-6, 1e-6, 20
GATES, QUANTIZED = 5e-5, 4e-3
REASON = (
    "gates: fn is kept to 16 bits, sums in fp32; streams and x: rounded once more than the gates that make them, "
    "so that a sum beside a rounding boundary falls on its other side"
)


def parameters(device: torch.device, seed: int, dim: int, outputs: int = OUTPUTS) -> tuple[Weights, torch.Tensor, torch.Tensor]:
    """fn, base, scale that make gates of every size."""
    fn = randn(device, seed, outputs, STREAMS * dim, scale=(STREAMS * dim) ** -0.5)
    scale = randn(device, seed + 2, 3 if outputs == OUTPUTS else 1, scale=0.3) + 1
    return Weights((fn,)), randn(device, seed + 1, outputs), scale


def norm_weight(device: torch.device, seed: int, dim: int) -> torch.Tensor:
    return (randn(device, seed, dim, scale=0.1) + 1).to(torch.bfloat16)


def last_gates(device: torch.device, seed: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """post and comb of the sublayer before: comb has columns of sum 1."""
    post = 2 * torch.sigmoid(randn(device, seed, tokens, STREAMS))
    return post, torch.softmax(randn(device, seed + 1, tokens, STREAMS, STREAMS), dim=1)


def check(outputs: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> None:
    """post and comb come last; what comes before is in the model's dtype, but for x in FP8, whose values come as float64."""
    for index, (out, ref) in enumerate(zip(outputs, expected, strict=True)):
        is_exact = index >= len(expected) - 2 or ref.dtype == torch.float32
        bound = QUANTIZED if ref.dtype == torch.float64 else GATES if is_exact else 2e-3
        error = relative_error(out, ref)
        assert error <= bound, f"output {index}: relative error {error:.3g} > {bound:g}"


def _draw(tokens: int, dim: int, dtype: torch.dtype = torch.bfloat16, spread: float = 1.0, is_quantized: bool = False) -> Draw:
    def draw(device: torch.device, seed: int) -> tuple[object, ...]:
        h = randn(device, seed, tokens, STREAMS, dim, dtype=dtype, scale=spread)
        return h, *parameters(device, seed + 1, dim), norm_weight(device, seed + 4, dim), EPS, HC_EPS, ITERATIONS, is_quantized

    return draw


def case(name: str, draw: Draw, small: bool = False) -> Case:
    return Case(name, draw, 2e-3, REASON, small, check=check)


CASES = (
    case("no tokens", _draw(0, 256), small=True),
    case("one token in fp32", _draw(1, 256, torch.float32), small=True),
    case("odd width in fp32", _draw(3, 48, torch.float32), small=True),
    case("no tokens, quantised", _draw(0, 256, is_quantized=True), small=True),
    case("fp32, quantised", _draw(2, 256, torch.float32, is_quantized=True), small=True),
    case("odd width in fp32, quantised", _draw(3, 176, torch.float32, is_quantized=True), small=True),
    case("narrow, quantised", _draw(1, 48, torch.float32, is_quantized=True), small=True),
    case("one token, quantised", _draw(1, 4096, is_quantized=True)),
    case("one token", _draw(1, 4096)),
    case("Pro one token", _draw(1, 7168)),
    case("demo batch", _draw(17, 256)),
    case("small and large streams", _draw(33, 4096, spread=300.0)),
    case("batch 64", _draw(64, 4096)),
    case("Pro batch 65", _draw(65, 7168)),
    case("batch 129", _draw(129, 4096)),
    case("Flash prefill", _draw(4097, 4096)),
    case("Pro prefill", _draw(1500, 7168)),
    case("fp32 prefill", _draw(300, 1024, torch.float32)),
)


def _bench(tokens: int, dim: int) -> Bench:
    gates = tokens * (STREAMS + STREAMS * STREAMS) * 4
    num_bytes = tokens * (STREAMS + 1) * dim * 2 + OUTPUTS * STREAMS * dim * 4 + gates
    return Bench(f"T={tokens} d={dim}", _draw(tokens, dim), num_bytes)


SHAPES = ((1, 4096), (32, 4096), (128, 4096), (1, 7168), (1024, 4096), (8192, 4096), (8192, 7168))
BENCH = tuple(_bench(tokens, dim) for tokens, dim in SHAPES)

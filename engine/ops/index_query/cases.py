"""Index queries of V4 (64 heads of 128 channels) in every index format."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from engine.cache.rows import Fp8IndexRows, index_rows
from engine.ops.cases import Bench, Case, Draw, randn, relative_error
from engine.ops.q_norm_rope.cases import angles

HEADS, WIDTH, SCALE = 64, 128, 0.011
REASON = "rotation and Hadamard in fp32: beside a rounding boundary of bf16, and then of the format, a value falls on its other side"


def _draw(tokens: int, index_format: str, dtype: torch.dtype, heads: int = HEADS, width: int = WIDTH) -> Draw:
    def draw(device: torch.device, seed: int) -> tuple[object, ...]:
        q, weights = randn(device, seed, tokens, heads, width, dtype=dtype), randn(device, seed + 1, tokens, heads + 16)[:, 16:]
        return q, weights, *angles(device, seed + 2, tokens, min(64, width // 2)), SCALE, index_rows(index_format, width)

    return draw


def _check(index_format: str, width: int, bound: float) -> Callable[[Sequence[torch.Tensor], Sequence[torch.Tensor]], None]:
    """Queries times head weights, as they are used."""

    def check(outputs: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> None:
        for out, ref in zip(outputs, expected, strict=True):
            assert out.shape == ref.shape and out.dtype == ref.dtype, f"{out.dtype} {out.shape}"
        (q, weights), (wanted, wanted_weights) = outputs, expected
        values, wanted_values = q.double() * weights[..., None].double(), wanted.double() * wanted_weights[..., None].double()
        error = relative_error(values, wanted_values)
        assert error <= bound, f"relative error {error:.3g} > {bound:g} ({REASON})"
        if isinstance(index_rows(index_format, width), Fp8IndexRows):
            error = relative_error(weights, wanted_weights)
            assert error <= 1e-3, f"head weights: relative error {error:.3g}"
        else:
            error = relative_error(weights, wanted_weights)
            assert error <= 1e-6, f"head weights: relative error {error:.3g}"

    return check


def _case(
    name: str,
    tokens: int,
    index_format: str,
    dtype: torch.dtype = torch.bfloat16,
    bound: float = 1e-2,
    small: bool = False,
    heads: int = HEADS,
    width: int = WIDTH,
) -> Case:
    draw = _draw(tokens, index_format, dtype, heads, width)
    return Case(name, draw, bound, REASON, small, check=_check(index_format, width, bound))


FP32 = torch.float32
CASES = (
    _case("no tokens", 0, "fp8", FP32, small=True),
    _case("one token", 1, "fp8", FP32, 1e-4, small=True),
    _case("one token fp4", 1, "fp4", FP32, 1e-4, small=True),
    _case("small heads in fp32", 3, "fp32", FP32, 1e-6, small=True, heads=5, width=32),
    _case("a batch of fp32", 66, "fp8", FP32, 1e-3),
    _case("tokens that need the matrix", 65, "fp8", FP32, 4e-3, small=True, heads=1),
    _case("eight tokens of bf16", 8, "fp8"),
    _case("eight tokens of bf16 in fp4", 8, "fp4", bound=2e-2),
    _case("one token of bf16", 1, "fp8"),
    _case("a batch", 129, "fp8"),
    _case("a batch in fp4", 129, "fp4", bound=2e-2),
    _case("a batch in bf16", 129, "bf16"),
    _case("prefill", 2048, "fp8"),
)


def _bench(tokens: int) -> Bench:
    num_bytes = tokens * HEADS * (WIDTH * 3 + 2 + 4) + tokens * 256
    return Bench(f"T={tokens}", _draw(tokens, "fp8", torch.bfloat16), num_bytes)


BENCH = (_bench(1), _bench(8), _bench(32), _bench(128), _bench(8192))

"""Projections of one input in one product: their own bits, whatever their formats; what cannot stand in one matrix stays apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from engine.config import EngineConfig
from engine.model.linear import Build, Linear, Linears
from engine.model.quantized import Weight, quantize_fp8, quantize_mxfp4, stack_rows
from engine.ops.registry import bind

CPU = torch.device("cpu")


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def bf16(*shape: int) -> torch.Tensor:
    return drawn(*shape).bfloat16()


def fp8(*shape: int) -> Weight:
    return quantize_fp8(drawn(*shape))


def mxfp4(*shape: int) -> Weight:
    return quantize_mxfp4(drawn(*shape))


def build_of(weights: dict[str, Weight], dtype: str) -> Build:
    nothing: Any = None
    engine = EngineConfig(device="cpu", dtype=dtype)
    return Build(nothing, bind(engine, CPU), weights, torch.bfloat16 if dtype == "bfloat16" else torch.float32)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    ("make", "heights", "is_one"),
    [
        (fp8, (256, 128, 100), True),
        (fp8, (100, 128, 256), False),
        (bf16, (64, 3, 10), True),
        (mxfp4, (7, 64, 9), True),
    ],
)
def test_outputs_are_those_of_the_projections_alone(
    make: Callable[..., Weight], heights: tuple[int, ...], is_one: bool, dtype: str
) -> None:
    weights = {str(number): make(height, 160) for number, height in enumerate(heights)}
    build = build_of(weights, dtype)
    x = drawn(5, 160).to(build.dtype)
    first, second = Linears(build, (("0", "1"), ("2",)))(x)
    alone = [Linear(build, name)(x) for name in weights]
    assert torch.equal(first, torch.cat(alone[:2], dim=1)) and torch.equal(second, alone[2])
    assert first.dtype == second.dtype == build.dtype
    assert (stack_rows(list(weights.values())) is not None) == is_one
    assert (first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()) == is_one


@pytest.mark.parametrize("other", [drawn(8, 128), fp8(128, 128), mxfp4(8, 128), bf16(8, 64)], ids=["fp32", "fp8", "mxfp4", "shorter rows"])
def test_what_differs_in_format_or_input_stays_apart(other: Weight) -> None:
    assert stack_rows([bf16(8, 128), other]) is None


def test_values_do_not_change_where_a_block_ends() -> None:
    """128 rows share a scale: here those of the two weights lie eight powers of two apart."""
    low, high = quantize_fp8(drawn(128, 200) * 2.0**-8), quantize_fp8(drawn(130, 200))
    stacked = stack_rows([low, high])
    assert stacked is not None and not isinstance(stacked, torch.Tensor)
    assert torch.equal(stacked.dequantize(), torch.cat((low.dequantize(), high.dequantize())))

"""Quantisation of weights on writing."""

from __future__ import annotations

import pytest
import torch

from core.errors import ConfigError
from engine.model.quantized import quantize_fp8, quantize_mxfp4, some_rows, to_float64


@pytest.mark.parametrize("shape", [(128, 128), (130, 257), (1, 1), (40, 384)])
def test_fp8_is_within_half_a_step_of_the_weight(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 3
    quantized = quantize_fp8(weight)
    assert quantized.shape == shape and quantized.scale.shape == (-(-shape[0] // 128), -(-shape[1] // 128))
    block = weight.abs().max()
    error = (quantized.dequantize() - weight).abs()
    assert bool((error <= torch.maximum(weight.abs() * 2**-4, block * 2**-9 / 100)).all())


def test_mxfp4_takes_the_nearest_code_and_even_ones_on_ties() -> None:
    codes = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    ties = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]
    evens = [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0]
    row = torch.tensor([codes + ties + [6.0] + [-value for value in codes + ties] + [0.0]])
    expected = torch.tensor([codes + evens + [6.0] + [-value for value in codes + evens] + [0.0]])
    quantized = quantize_mxfp4(row)
    assert torch.equal(quantized.dequantize(), expected)
    assert torch.equal(quantize_mxfp4(row * 2.0**-9).dequantize(), expected * 2.0**-9)


def test_some_rows_of_a_weight_have_its_values_and_whole_blocks() -> None:
    weight = torch.randn(384, 96, generator=torch.Generator().manual_seed(3))
    for whole in (weight, quantize_fp8(weight), quantize_mxfp4(weight)):
        part = some_rows(whole, slice(128, 384))
        assert part.shape == (256, 96) and torch.equal(to_float64(part), to_float64(whole)[128:384])
    with pytest.raises(ConfigError, match="rows 0 to 64 of an FP8 weight are to be used; they must be multiples of 128"):
        some_rows(quantize_fp8(weight), slice(0, 64))


def test_values_of_a_format_survive_being_quantised_again() -> None:
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(2))
    for quantize in (quantize_fp8, quantize_mxfp4):
        once = quantize(weight).dequantize()
        assert torch.equal(quantize(once).dequantize(), once)

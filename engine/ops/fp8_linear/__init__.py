"""y = x W^T with activations quantised to FP8 per token and 128 channels (engine/model/deepseek_v4.md, 2)."""

from __future__ import annotations

import torch

from engine.model.quantized import FP8_BLOCK, FP8_MAX, QuantizedRows, QuantizedWeight, ceil_exponent_byte, exp2_of_byte
from engine.ops import requires
from engine.ops.registry import Impl, Op

AMAX_FLOOR = 1e-4


def quantize_rows(x: torch.Tensor) -> QuantizedRows:
    """x [..., K], filled up with zeros to a multiple of 128, in FP8: groups of 128 channels, scale 2^ceil(log2(amax/448))."""
    groups = torch.nn.functional.pad(x.float(), (0, -x.shape[-1] % FP8_BLOCK)).unflatten(-1, (-1, FP8_BLOCK))
    scale = exp2_of_byte(ceil_exponent_byte(groups.abs().amax(-1).clamp(min=AMAX_FLOOR) / FP8_MAX))
    codes = (groups / scale[..., None]).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    return QuantizedRows(codes.flatten(-2), scale, x.dtype)


def act_quant(x: torch.Tensor) -> torch.Tensor:
    """The float64 values that x [..., K] takes after FP8 quantisation."""
    return quantize_rows(x).double()[..., : x.shape[-1]]


def fp8_linear(x: torch.Tensor | QuantizedRows, weight: torch.Tensor) -> torch.Tensor:
    """x: [..., K] bf16, or what `quantize_rows` makes of [T, K], best laid out as by `QuantizedRows.empty`; weight: FP8 [N, K] as `pack`
    made it. Returns [..., N] in x's dtype."""
    values = act_quant(x) if isinstance(x, torch.Tensor) else x.double()[:, : weight.shape[1]]
    return (values @ weight.T).to(x.dtype)


def pack(weight: QuantizedWeight) -> torch.Tensor:
    """float64 [N, K]."""
    return weight.dequantize(torch.float64)


OP = Op(
    "fp8_linear",
    fp8_linear,
    pack,
    backends={
        "deep_gemm": Impl("engine.ops.fp8_linear.deep_gemm", requires.deep_gemm),
        "triton": Impl("engine.ops.fp8_linear.triton", requires.triton),
    },
)

"""The routed experts: sum over a token's experts of weight * W2 (clamped SwiGLU of W1 x, W3 x) (spec 2.5)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.model.quantized import QuantizedRows, Weight, to_float64
from engine.ops import requires
from engine.ops.fp8_linear import act_quant
from engine.ops.registry import Impl, Op
from engine.ops.swiglu import clamped_swiglu


@dataclass(frozen=True, slots=True)
class PackedExperts:
    """Weights of the experts held here (in a group a part of all), as the reference wants them: float64, dequantised."""

    w13: torch.Tensor
    """[E, 2 I, d]: gate rows, then up rows."""
    w2: torch.Tensor
    """[E, d, I]."""
    quantize_activations: bool
    """FP8 per token and 128 channels before each product (off in float32 mode)."""


@dataclass(frozen=True, slots=True)
class Rooms:
    """Rows that lie by expert, each expert's in a room of its own, mostly empty, and where their results go: rows [e, :counts[e]]. What is
    behind them may be anything, and stays."""

    codes: torch.Tensor
    """e4m3 [E, room, d], contiguous."""
    scale: torch.Tensor
    """fp32 [E, room, d / 128], powers of two; strides of any order."""
    counts: torch.Tensor
    """int32 [E]."""
    most: int
    """Rows that there can be in all, whatever the counts."""
    usual: int
    """Rows that there are with even load, 1 to most: what tiles and grids are made for. More take longer."""
    out: torch.Tensor
    """bf16 [E, room, d]; rows may lie apart, at equal distances over all experts."""


def moe_experts(
    x: torch.Tensor | QuantizedRows | Rooms,
    ids: torch.Tensor | None,
    weights: torch.Tensor | None,
    experts: PackedExperts,
    limit: float,
    sum_dtype: torch.dtype | None = torch.float32,
    among: int | None = None,
) -> torch.Tensor:
    """x: [T, d], or what `quantize_rows` makes of it, which is the same to experts that quantise; ids: int64 [T, k], places in `experts`,
    -1 for none; weights: fp32 [T, k]. Returns [T, d], the sum over k, in sum_dtype; with None what would be summed, [T, k, d] in x's
    dtype, undefined for -1. among: how many experts, here and elsewhere, the ids were chosen from, None for those here only: so many rows
    an expert are what tiles are made for.

    Products are rounded to x's dtype; the weight is applied in fp32, before W2.

    x in rooms: ids and weights are None, since where a row lies says whose it is, and weights stay elsewhere. Writes each row's result to
    x.out, and returns that.
    """
    if isinstance(x, Rooms):
        for expert, count in enumerate(x.counts.tolist()):
            rows = QuantizedRows(x.codes[expert, :count], x.scale[expert, :count], x.out.dtype)
            one = torch.full((count, 1), expert, device=x.out.device)
            x.out[expert, :count] = moe_experts(rows, one, torch.ones(count, 1, device=x.out.device), experts, limit, x.out.dtype)
        return x.out
    assert ids is not None and weights is not None, "rows that lie in no rooms, without ids or weights"
    assert experts.quantize_activations or isinstance(x, torch.Tensor), "experts that do not quantise, of quantised rows"
    quantize = act_quant if experts.quantize_activations else torch.Tensor.double
    inputs = quantize(x) if isinstance(x, torch.Tensor) else x.double()
    out = inputs.new_zeros(*(ids.shape if sum_dtype is None else ids.shape[:1]), inputs.shape[1])
    for expert in torch.unique(ids[ids >= 0]).tolist():
        tokens, place = torch.nonzero(ids == expert, as_tuple=True)
        gate, up = (inputs[tokens] @ experts.w13[expert].T).to(x.dtype).float().chunk(2, dim=1)
        hidden = clamped_swiglu(gate, up, limit, torch.float32) * weights[tokens, place, None]
        results = (quantize(hidden.to(x.dtype)) @ experts.w2[expert].T).to(x.dtype).double()
        if sum_dtype is None:
            out[tokens, place] = results
        else:
            out.index_add_(0, tokens, results)
    return out.to(sum_dtype or x.dtype)


def pack(w1: list[Weight], w2: list[Weight], w3: list[Weight], quantize_activations: bool) -> PackedExperts:
    """One weight an expert in each list: w1 gate [I, d], w3 up [I, d], w2 down [d, I]."""
    w13 = [torch.cat((to_float64(gate), to_float64(up))) for gate, up in zip(w1, w3, strict=True)]
    return PackedExperts(torch.stack(w13), torch.stack([to_float64(down) for down in w2]), quantize_activations)


OP = Op(
    "moe_experts",
    moe_experts,
    pack,
    backends={
        "deep_gemm": Impl("engine.ops.moe_experts.deep_gemm", requires.deep_gemm),
        "triton": Impl("engine.ops.moe_experts.triton", requires.triton),
    },
)

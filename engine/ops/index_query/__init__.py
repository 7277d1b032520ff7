"""Queries of the lightning indexer: rotated, spread by the Hadamard matrix and quantised like the keys they meet (spec 2.4)."""

from __future__ import annotations

import functools

import torch

from engine.cache.rows import Fp4IndexRows, Fp8IndexRows, RowFormat
from engine.model.rope import rotate
from engine.ops import requires
from engine.ops.registry import Impl, Op


@functools.cache
def hadamard(size: int, device: torch.device) -> torch.Tensor:
    """Sylvester's matrix of order `size` (a power of two), normalised to be orthogonal; float64. Not to be written to."""
    matrix = torch.ones(1, 1, dtype=torch.float64, device=device)
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix * size**-0.5


def spread(x: torch.Tensor, form: RowFormat) -> torch.Tensor:
    """x [..., Di] times the Hadamard matrix if the keys are quantised (formats fp8 and fp4), else x."""
    if not isinstance(form, Fp8IndexRows | Fp4IndexRows):
        return x
    return (x.double() @ hadamard(x.shape[-1], x.device)).to(x.dtype)


def index_query(
    q: torch.Tensor, weights: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, scale: float, form: RowFormat
) -> tuple[torch.Tensor, torch.Tensor]:
    """q: [T, Hi, Di] bf16 or fp32 of the projection; weights: [T, Hi] of the heads, rounded to q's dtype here; cos, sin: fp32
    [T, rope / 2]; scale: factor of the weights; form: of the index keys. Returns (queries [T, Hi, Di], head weights fp32 [T, Hi]) for
    `index_logits`. In format fp8 the queries are e4m3 codes and their fp32 scales are folded into the weights; else they hold the
    values themselves, in form.dtype.
    """
    turned = spread(rotate(q.double(), cos, sin).to(q.dtype), form)
    factors = weights.to(q.dtype).float() * scale
    if not isinstance(form, Fp8IndexRows):
        return form.round_trip(turned.flatten(0, 1)).view(q.shape), factors
    data, scales = form.encode(turned.flatten(0, 1))
    return data.view(torch.float8_e4m3fn).view(q.shape), factors * scales.view(torch.float32).view(factors.shape)


OP = Op("index_query", index_query, backends={"triton": Impl("engine.ops.index_query.triton", requires.triton)})

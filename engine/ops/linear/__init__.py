"""y = x W^T with an unquantised weight."""

from __future__ import annotations

import torch

from engine.ops import requires
from engine.ops.registry import Impl, Op


def linear(x: torch.Tensor, weight: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    """x: [..., K] bf16 or fp32; weight: [N, K], as `pack` made it. Returns [..., N] in out_dtype (fp32 for router, compressors,
    head; x's dtype elsewhere)."""
    return (x.double() @ weight.T).to(out_dtype)


def pack(weight: torch.Tensor) -> torch.Tensor:
    """float64 [N, K]."""
    return weight.double()


OP = Op(
    "linear",
    linear,
    pack,
    backends={
        "triton": Impl("engine.ops.linear.triton", requires.triton),
        "cublas": Impl("engine.ops.linear.cublas", requires.cuda),
    },
)

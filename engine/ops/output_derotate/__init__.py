"""Undo the rotation that attention's values carry: the inverse rotation at the query's position (spec 2.2)."""

from __future__ import annotations

import torch

from engine.model.rope import rotate
from engine.ops import requires
from engine.ops.registry import Impl, Op


def output_derotate(o: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """o: [T, H, D]; cos, sin: fp32 [T, rope / 2] of the query positions. Returns o's shape and dtype. The caller
    gives o up: a backend may change it in place and return it."""
    return rotate(o.double(), cos, sin, inverse=True).to(o.dtype)


OP = Op("output_derotate", output_derotate, backends={"triton": Impl("engine.ops.output_derotate.triton", requires.triton)})

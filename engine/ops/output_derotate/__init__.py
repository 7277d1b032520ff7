"""Undo the rotation that attention's values carry: the inverse rotation at the query's position (spec 2.2.3)."""

from __future__ import annotations

import torch

from engine.model.rope import rotate
from engine.ops.registry import Op


def output_derotate(o: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """o: [T, H, D]; cos, sin: fp32 [T, rope / 2] of the query positions. Returns o's shape and dtype."""
    return rotate(o.double(), cos, sin, inverse=True).to(o.dtype)


OP = Op("output_derotate", output_derotate)

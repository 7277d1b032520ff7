"""Rows of a pool, gathered and decoded."""

from __future__ import annotations

import torch

from engine.cache.arena import RowPool
from engine.ops import requires
from engine.ops.registry import Impl, Op


def pool_rows(pool: RowPool, units: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """units, rows: int64 [N], where in the pool each row lies. Returns the values as stored, [N, D] in pool.form.dtype."""
    return pool.read(units, rows)


OP = Op("pool_rows", pool_rows, backends={"triton": Impl("engine.ops.pool_rows.triton", requires.triton)})

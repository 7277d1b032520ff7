"""Where chosen entries of a sequence lie in their pool."""

from __future__ import annotations

import torch

from engine.batch import TokenPlaces
from engine.ops import requires
from engine.ops.registry import Impl, Op


def page_rows(numbers: torch.Tensor, places: TokenPlaces, per_page: int) -> torch.Tensor:
    """numbers: int32 [T, K], entries of each token's sequence, -1 unused -> rows page * per_page + r of the pool, int32 [T, K]."""
    return places.rows_of(numbers, per_page)


OP = Op("page_rows", page_rows, backends={"triton": Impl("engine.ops.page_rows.triton", requires.triton)})

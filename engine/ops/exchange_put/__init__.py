"""Experts' rows back to where those they were made of had come from: the other half of exchange_take."""

from __future__ import annotations

import torch

from engine.ops import requires
from engine.ops.registry import Impl, Op


def exchange_put(rows: torch.Tensor, places: torch.Tensor, buffer: torch.Tensor) -> None:
    """rows: bf16 [R, d]; places: int64 [R], expert * room + row, -1 for none; buffer: bf16 [E, room, d], whose rows may lie apart, at equal
    distances over all experts. Writes the rows to their places."""
    kept = places >= 0
    buffer[places[kept] // buffer.shape[1], places[kept] % buffer.shape[1]] = rows[kept]


OP = Op("exchange_put", exchange_put, backends={"triton": Impl("engine.ops.exchange_put.triton", requires.triton)})

"""The rows that a prompt's tokens attend to, where window and entries of all sequences stand one after the other (prompts.py)."""

from __future__ import annotations

import torch

from engine.ops import requires
from engine.ops.registry import Impl, Op

MULTIPLE = 128
"""Of columns, which attention takes by so many."""


def prompt_indices(window: torch.Tensor, chosen: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """window: int32 [T, 128], rows of each token's window, -1 unused; chosen: int32 [T, K], entries of its sequence, -1 unused; base:
    int32 [T], the row of the sequence's entry 0. Returns int32 [T, 128 + K'], rows, -1 unused, K' the next multiple of 128."""
    entries = torch.where(chosen >= 0, chosen + base[:, None], -1)
    return torch.cat((window, torch.nn.functional.pad(entries, (0, -entries.shape[1] % MULTIPLE), value=-1)), dim=1)


OP = Op("prompt_indices", prompt_indices, backends={"triton": Impl("engine.ops.prompt_indices.triton", requires.triton)})

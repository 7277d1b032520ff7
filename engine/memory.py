"""The arena's two regions as addresses, for whoever registers memory with a transport."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class MemoryRun:
    """A contiguous tensor [num_pieces, piece_bytes] as a place in memory."""

    address: int
    num_pieces: int
    piece_bytes: int
    device_id: int
    memory: str
    """"DRAM" or "VRAM"."""


def memory_run(pieces: torch.Tensor) -> MemoryRun:
    assert pieces.is_contiguous() and pieces.dtype == torch.uint8, "an arena's memory is contiguous bytes"
    on_gpu = pieces.device.type == "cuda"
    return MemoryRun(
        pieces.data_ptr(), len(pieces), pieces.shape[1], pieces.device.index or 0 if on_gpu else 0, "VRAM" if on_gpu else "DRAM"
    )

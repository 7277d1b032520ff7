"""The arena's two regions as places in memory, for whoever registers them with a transport."""

from __future__ import annotations

import torch

from core.region import Region


def region_of(pieces: torch.Tensor) -> Region:
    """pieces: uint8 [num_pieces, piece_bytes], contiguous."""
    assert pieces.is_contiguous() and pieces.dtype == torch.uint8, "an arena's memory is contiguous bytes"
    num_pieces, piece_bytes = pieces.shape
    on_gpu = pieces.device.type == "cuda"
    return Region(
        address=pieces.data_ptr(),
        num_pieces=num_pieces,
        piece_bytes=piece_bytes,
        device_id=pieces.device.index or 0 if on_gpu else 0,
        memory="VRAM" if on_gpu else "DRAM",
    )

"""A run of equal pieces (pages or slots) in the memory of one process: what a transport registers, and a peer is told."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Region:
    """Contiguous."""

    address: int
    """Of the first byte, as the process sees it."""
    num_pieces: int
    piece_bytes: int
    device_id: int = 0
    """Of a GPU, as the process counts them."""
    memory: str = "DRAM"
    """"DRAM" or "VRAM"."""

    @property
    def num_bytes(self) -> int:
        return self.num_pieces * self.piece_bytes

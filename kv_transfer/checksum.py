"""Checked mode: a checksum of a page or slot where it lies."""

from __future__ import annotations

import ctypes
import zlib

from core.errors import ConfigError
from core.region import Region


def checksum(region: Region, piece: int) -> int:
    """CRC-32 of one piece's bytes. Only for memory that the CPU can read."""
    if region.memory != "DRAM":
        raise ConfigError("transfer.checksum needs pages in host memory; they are on a GPU here")
    start = region.address + piece * region.piece_bytes
    return zlib.crc32((ctypes.c_char * region.piece_bytes).from_address(start))

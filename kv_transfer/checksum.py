"""Checked mode: a checksum of a page or slot where it lies, in host memory or on a GPU."""

from __future__ import annotations

import ctypes
import functools
import zlib
from typing import Any

from core.errors import TransferFailed
from core.region import Region


def checksum(region: Region, piece: int) -> int:
    """CRC-32 of one piece's bytes. On a GPU it waits for what its default stream has under way, and raises TransferFailed if the memory
    cannot be read."""
    start = region.address + piece * region.piece_bytes
    if region.memory == "DRAM":
        return zlib.crc32((ctypes.c_char * region.piece_bytes).from_address(start))
    return zlib.crc32(read_gpu(_driver(), region.device_id, start, region.piece_bytes))


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def read_gpu(driver: Any, device: int, address: int, num_bytes: int) -> ctypes.Array[ctypes.c_char]:
    """A copy in host memory. `driver`: libcuda, initialised by who allocated the memory; any thread may call."""

    def call(name: str, *arguments: Any) -> None:
        status = getattr(driver, name)(*arguments)
        if status:
            raise TransferFailed(f"{num_bytes} bytes of GPU {device} cannot be read: {name} failed with CUDA error {status}")

    copy, context, popped = (ctypes.c_char * num_bytes)(), ctypes.c_void_p(), ctypes.c_void_p()
    call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
    try:
        call("cuCtxPushCurrent_v2", context)
        try:
            call("cuMemcpyDtoH_v2", copy, ctypes.c_uint64(address), ctypes.c_size_t(num_bytes))
        finally:
            call("cuCtxPopCurrent_v2", ctypes.byref(popped))
    finally:
        call("cuDevicePrimaryCtxRelease_v2", device)
    return copy

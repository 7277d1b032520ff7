from __future__ import annotations

import ctypes
import dataclasses
import zlib
from typing import Any

import pytest

from core.errors import TransferFailed
from core.region import Region
from kv_transfer.checksum import checksum, read_gpu

SIZE, COUNT = 1000, 3


@pytest.fixture
def memory() -> Any:
    return (ctypes.c_uint8 * (SIZE * COUNT))(*(i * 7 % 251 for i in range(SIZE * COUNT)))


class Driver:
    """libcuda whose GPU memory is the host's; contexts must come and go in order."""

    def __init__(self, fails: str = "") -> None:
        self._fails = fails
        self.open: list[str] = []

    def _take(self, name: str) -> int:
        return 700 if name == self._fails else 0

    def cuDevicePrimaryCtxRetain(self, context: Any, device: int) -> int:
        context._obj.value = 5
        self.open.append(f"device {device}")
        return self._take("cuDevicePrimaryCtxRetain")

    def cuCtxPushCurrent_v2(self, context: Any) -> int:
        assert context.value == 5
        self.open.append("context")
        return self._take("cuCtxPushCurrent_v2")

    def cuMemcpyDtoH_v2(self, copy: Any, address: Any, num_bytes: Any) -> int:
        assert self.open == ["device 1", "context"]
        ctypes.memmove(copy, address.value, num_bytes.value)
        return self._take("cuMemcpyDtoH_v2")

    def cuCtxPopCurrent_v2(self, context: Any) -> int:
        assert self.open.pop() == "context"
        return 0

    def cuDevicePrimaryCtxRelease_v2(self, device: int) -> int:
        assert self.open.pop() == f"device {device}"
        return 0


def test_each_piece_has_the_sum_of_its_own_bytes(memory: Any) -> None:
    region = Region(address=ctypes.addressof(memory), num_pieces=COUNT, piece_bytes=SIZE)
    sums = [checksum(region, piece) for piece in range(COUNT)]
    assert sums == [zlib.crc32(bytes(memory)[i * SIZE : (i + 1) * SIZE]) for i in range(COUNT)] and len(set(sums)) == COUNT


def test_gpu_memory_is_copied_and_no_context_stays(memory: Any) -> None:
    driver = Driver()
    assert bytes(read_gpu(driver, 1, ctypes.addressof(memory) + SIZE, SIZE)) == bytes(memory)[SIZE : 2 * SIZE]
    assert driver.open == []


def test_memory_that_cannot_be_read_is_said_and_no_context_stays(memory: Any) -> None:
    driver = Driver("cuMemcpyDtoH_v2")
    with pytest.raises(TransferFailed, match="GPU 1 cannot be read: cuMemcpyDtoH_v2 failed with CUDA error 700"):
        read_gpu(driver, 1, ctypes.addressof(memory), SIZE)
    assert driver.open == []


@pytest.mark.gpu
def test_a_page_has_the_same_sum_on_a_gpu(memory: Any) -> None:
    import torch

    on_gpu = torch.tensor(list(memory), dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    here = Region(address=ctypes.addressof(memory), num_pieces=COUNT, piece_bytes=SIZE)
    there = dataclasses.replace(here, address=on_gpu.data_ptr(), device_id=on_gpu.device.index, memory="VRAM")
    assert [checksum(there, piece) for piece in range(COUNT)] == [checksum(here, piece) for piece in range(COUNT)]

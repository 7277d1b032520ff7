from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch

from core.errors import ConfigError
from engine.cache.arena import Arena
from engine.cache.fabric_memory import FABRIC, FABRIC_SUPPORTED, POSIX_FILE_DESCRIPTOR, RDMA_WITH_VMM_SUPPORTED, fabric_zeros, reserve
from engine.cache.layout import build_layout
from engine.config import EngineConfig, ModelConfig
from tests.support.checkpoints import SMALL

MIB = 2**20
ADDRESS, HANDLE = 0x7F00_0000_0000, 77


class Driver:
    """libcuda as far as `reserve` sees it: checks what it is given, and answers as a GPU would."""

    def __init__(self, attributes: dict[int, int], refuses: dict[str, int] | None = None) -> None:
        self._attributes, self._refuses = attributes, refuses or {}
        self.calls: list[str] = []
        self.num_bytes = 0

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> int:
            self.calls.append(name)
            if name in self._refuses:
                return self._refuses[name]
            getattr(self, f"_{name}")(*(getattr(a, "_obj", a) for a in arguments))
            return 0

        if name.startswith("_"):
            raise AttributeError(name)
        return call

    def _cuDeviceGetAttribute(self, found: Any, number: int, device: int) -> None:
        assert device == 1
        found.value = self._attributes[number]

    def _cuMemGetAllocationGranularity(self, found: Any, wanted: Any, flags: int) -> None:
        self._check(wanted)
        found.value = 2 * MIB

    def _cuMemCreate(self, handle: Any, size: Any, wanted: Any, flags: Any) -> None:
        self._check(wanted)
        self.num_bytes, handle.value = size.value, HANDLE

    def _cuMemAddressReserve(self, address: Any, size: Any, alignment: Any, wanted: Any, flags: Any) -> None:
        assert size.value == self.num_bytes
        address.value = ADDRESS

    def _cuMemMap(self, address: Any, size: Any, offset: Any, handle: Any, flags: Any) -> None:
        assert (address.value, size.value, offset.value, handle.value) == (ADDRESS, self.num_bytes, 0, HANDLE)

    def _cuMemSetAccess(self, address: Any, size: Any, access: Any, count: Any) -> None:
        assert (address.value, size.value, count.value) == (ADDRESS, self.num_bytes, 1)
        assert (access.location.type, access.location.id, access.flags) == (1, 1, 3)

    def _check(self, wanted: Any) -> None:
        assert ctypes.sizeof(wanted) == 32, "CUmemAllocationProp of the driver"
        assert (wanted.type, wanted.location.type, wanted.location.id) == (1, 1, 1)
        self.handle_types, self.rdma = wanted.handle_types, wanted.gpu_direct_rdma


@pytest.mark.parametrize("rdma", [0, 1])
@pytest.mark.parametrize(("num_bytes", "mapped"), [(1, 2 * MIB), (2 * MIB, 2 * MIB), (5 * MIB, 6 * MIB), (200 * 2**30, 200 * 2**30)])
def test_what_is_mapped_is_large_enough_and_of_the_kind_asked_for(num_bytes: int, mapped: int, rdma: int) -> None:
    driver = Driver({FABRIC_SUPPORTED: 1, RDMA_WITH_VMM_SUPPORTED: rdma})
    assert reserve(driver, num_bytes, 1, FABRIC) == ADDRESS
    assert (driver.num_bytes, driver.handle_types, driver.rdma) == (mapped, FABRIC, rdma)
    assert driver.calls[-4:] == ["cuMemCreate", "cuMemAddressReserve", "cuMemMap", "cuMemSetAccess"]


@pytest.mark.parametrize(
    ("supported", "refuses", "says"),
    [
        (0, {}, "knows no fabric handles"),
        (1, {"cuMemCreate": 800}, "nvidia-imex"),
        (1, {"cuMemCreate": 2}, "bytes are free on GPU 1"),
        (1, {"cuMemMap": 1}, "cuMemMap failed with CUDA error 1"),
    ],
)
def test_what_is_missing_is_said(supported: int, refuses: dict[str, int], says: str) -> None:
    driver = Driver({FABRIC_SUPPORTED: supported, RDMA_WITH_VMM_SUPPORTED: 1}, refuses)
    with pytest.raises(ConfigError, match=says):
        reserve(driver, MIB, 1, FABRIC)


def test_it_is_refused_on_a_cpu() -> None:
    with pytest.raises(ConfigError, match=r"engine\.fabric_memory is for GPUs"):
        Arena(build_layout(ModelConfig.from_dict(SMALL), EngineConfig(), "m"), 2, 2, "cpu", in_fabric=True)


@pytest.mark.gpu
def test_torch_works_in_memory_of_the_driver() -> None:
    """Not a fabric handle, which needs IMEX; the rest is the same."""
    found = fabric_zeros(3, 5 * MIB, torch.device("cuda", torch.cuda.current_device()), POSIX_FILE_DESCRIPTOR)
    assert found.shape == (3, 5 * MIB) and found.is_contiguous() and not found.any()
    found[1] = torch.arange(5 * MIB, device=found.device).to(torch.uint8)
    copy = found.clone()
    assert torch.equal(found, copy) and int(copy[1].sum()) == int((torch.arange(5 * MIB) % 256).sum())
    assert not found[0].any() and not found[2].any()

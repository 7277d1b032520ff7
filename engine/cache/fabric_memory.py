"""GPU memory that GPUs of other nodes in an NVLink domain can map: `fabric_zeros(rows, columns, device)`.

What torch allocates (cudaMalloc) can be mapped by processes of the same node only. On GB200 and GB300 racks UCX moves it between nodes over
NICs or TCP, without a word, however the links are. Memory made by the driver's virtual memory calls with a fabric handle is mapped through
IMEX instead (openucx.org FAQ, "Multi-node NVLINK"; CUDA driver API, "Virtual Memory Management"). Like an arena it is never freed.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch

from core.errors import ConfigError

PINNED, ON_DEVICE, READ_WRITE, RECOMMENDED = 1, 1, 3, 1
POSIX_FILE_DESCRIPTOR, FABRIC = 1, 8
"""CU_MEM_HANDLE_TYPE_*: how others may map it; the first within a node, which every GPU can (for tests)."""
FABRIC_SUPPORTED, RDMA_WITH_VMM_SUPPORTED = 128, 110
"""CU_DEVICE_ATTRIBUTE_*"""
OUT_OF_MEMORY, NOT_PERMITTED = 2, 800


class _Location(ctypes.Structure):
    _fields_ = [("type", ctypes.c_int), ("id", ctypes.c_int)]


class _Properties(ctypes.Structure):
    """CUmemAllocationProp"""

    _fields_ = [
        ("type", ctypes.c_int),
        ("handle_types", ctypes.c_int),
        ("location", _Location),
        ("win32", ctypes.c_void_p),
        ("compression", ctypes.c_ubyte),
        ("gpu_direct_rdma", ctypes.c_ubyte),
        ("usage", ctypes.c_ushort),
        ("reserved", ctypes.c_ubyte * 4),
    ]


class _Access(ctypes.Structure):
    """CUmemAccessDesc"""

    _fields_ = [("location", _Location), ("flags", ctypes.c_int)]


def reserve(driver: Any, num_bytes: int, device_index: int, handle_type: int) -> int:
    """Address of at least so many bytes on a device, mapped as long as the process lives. `driver`: libcuda, with the device's primary
    context current (torch's). Raises ConfigError saying what is missing."""

    def call(name: str, *arguments: Any) -> None:
        status = getattr(driver, name)(*arguments)
        if status == NOT_PERMITTED:
            raise ConfigError(
                "engine.fabric_memory: not permitted on this node; nvidia-imex and a channel in /dev/nvidia-caps-imex-channels?"
            )
        if status == OUT_OF_MEMORY:
            raise ConfigError(f"engine.fabric_memory: no {num_bytes} bytes are free on GPU {device_index}")
        if status:
            raise ConfigError(f"engine.fabric_memory: {name} failed with CUDA error {status} on GPU {device_index}")

    def attribute(number: int) -> int:
        found = ctypes.c_int()
        call("cuDeviceGetAttribute", ctypes.byref(found), number, device_index)
        return found.value

    if handle_type == FABRIC and not attribute(FABRIC_SUPPORTED):
        raise ConfigError(f"engine.fabric_memory: GPU {device_index} or its driver knows no fabric handles")
    location = _Location(ON_DEVICE, device_index)
    wanted = _Properties(type=PINNED, handle_types=handle_type, location=location)
    wanted.gpu_direct_rdma = 1 if attribute(RDMA_WITH_VMM_SUPPORTED) else 0  # or NICs could not reach it
    granularity, handle, address = ctypes.c_size_t(), ctypes.c_uint64(), ctypes.c_uint64()
    call("cuMemGetAllocationGranularity", ctypes.byref(granularity), ctypes.byref(wanted), RECOMMENDED)
    size = ctypes.c_size_t(-(-num_bytes // granularity.value) * granularity.value)
    call("cuMemCreate", ctypes.byref(handle), size, ctypes.byref(wanted), ctypes.c_uint64(0))
    call("cuMemAddressReserve", ctypes.byref(address), size, ctypes.c_size_t(0), ctypes.c_uint64(0), ctypes.c_uint64(0))
    call("cuMemMap", address, size, ctypes.c_size_t(0), handle, ctypes.c_uint64(0))
    call("cuMemSetAccess", address, size, ctypes.byref(_Access(location, READ_WRITE)), ctypes.c_size_t(1))
    return address.value


class _Bytes:
    """What torch.as_tensor takes for a tensor that is there."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.__cuda_array_interface__ = {"shape": (num_bytes,), "typestr": "|u1", "data": (address, False), "version": 3}


def fabric_zeros(rows: int, columns: int, device: torch.device, handle_type: int = FABRIC) -> torch.Tensor:
    """uint8 [rows, columns], contiguous, in memory of its own. Raises ConfigError."""
    if device.type != "cuda":
        raise ConfigError(f"engine.fabric_memory is for GPUs; this rank runs on {device}")
    with torch.cuda.device(device):
        torch.cuda.synchronize(device)  # makes the primary context current
        index = torch.cuda.current_device()
        address = reserve(ctypes.CDLL("libcuda.so.1"), rows * columns, index, handle_type)
        found = torch.as_tensor(_Bytes(address, rows * columns), device=device).view(rows, columns)
    assert found.data_ptr() == address, "torch has made a copy"
    return found.zero_()

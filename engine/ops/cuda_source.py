"""CUDA C++ kernels, compiled when first used with NVRTC: for what Triton cannot express (clusters, another block's shared memory).

    kernel = cuda_kernel(pathlib.Path("kernel.cu"), "index_topk", device, MAX_K=512)
    kernel(grid, threads, (tensor, ctypes.c_int(3)), cluster=8)

A source file includes nothing, so that NVRTC (which comes with torch) and the driver are all it needs, and declares its kernels
extern "C". Launches go to torch's current stream and can be captured into CUDA graphs.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import pathlib
from collections.abc import Sequence
from typing import Any

import torch

from core.errors import ConfigError

_CLUSTER_DIMENSION = 4
"""CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION."""
_MOST_SHARED_BYTES = 8
"""CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES."""


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute, with the part of its value that we set."""

    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_uint * 16))


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("num_attributes", ctypes.c_uint),
    )


class CudaKernel:
    """One function of a compiled source, on one device."""

    def __init__(self, cubin: bytes, name: str, shared_bytes: int = 0) -> None:
        """shared_bytes: of each block, beside what the source declares with a size."""
        self._shared_bytes = shared_bytes
        self._driver = ctypes.CDLL("libcuda.so.1")
        module, self._function = ctypes.c_void_p(), ctypes.c_void_p()
        self._check(self._driver.cuModuleLoadData(ctypes.byref(module), cubin))
        self._check(self._driver.cuModuleGetFunction(ctypes.byref(self._function), module, name.encode()))
        self._check(self._driver.cuFuncSetAttribute(self._function, _MOST_SHARED_BYTES, shared_bytes))

    def _check(self, result: int) -> None:
        if result != 0:
            text = ctypes.c_char_p()
            self._driver.cuGetErrorString(result, ctypes.byref(text))
            raise RuntimeError(f"CUDA driver: {(text.value or b'unknown error').decode()}")

    def __call__(self, num_blocks: int, num_threads: int, arguments: Sequence[Any], cluster: int = 1) -> None:
        """Tensors go as pointers, numbers as the ctypes values they are given as; `cluster` divides num_blocks."""
        values = [ctypes.c_void_p(value.data_ptr()) if isinstance(value, torch.Tensor) else value for value in arguments]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        attribute = _Attribute(id=_CLUSTER_DIMENSION)
        attribute.value[:3] = (cluster, 1, 1)
        config = _Config(
            grid=(num_blocks, 1, 1),
            block=(num_threads, 1, 1),
            shared_bytes=self._shared_bytes,
            stream=torch.cuda.current_stream().cuda_stream,
            attributes=ctypes.pointer(attribute),
            num_attributes=1,
        )
        self._check(self._driver.cuLaunchKernelEx(ctypes.byref(config), self._function, pointers, None))


@functools.cache
def cuda_kernel(source: pathlib.Path, name: str, device: torch.device, shared_bytes: int = 0, **defines: int) -> CudaKernel:
    """Compiled once a process for each device and set of macros."""
    major, minor = torch.cuda.get_device_capability(device)
    with torch.cuda.device(device):
        torch.cuda.current_stream().synchronize()  # makes torch's context the thread's current one
        return CudaKernel(compile_cubin(source, 10 * major + minor, **defines), name, shared_bytes)


@functools.cache
def nvrtc_library() -> str | None:
    """Name or path of libnvrtc: the loader's, or the one in the packages that torch depends on; None if there is none."""
    names = ["libnvrtc.so.13", "libnvrtc.so.12"]
    packages = importlib.util.find_spec("nvidia")
    for root in packages.submodule_search_locations or () if packages else ():
        names += sorted(str(path) for path in pathlib.Path(root).glob("*/lib/libnvrtc.so.1*") if "alt" not in path.name)
    for name in names:
        try:
            if (path := pathlib.Path(name)).is_absolute():  # NVRTC looks for its other half by name, and not beside itself
                for other in path.parent.glob("libnvrtc-builtins.so.*"):
                    ctypes.CDLL(str(other))
            ctypes.CDLL(name)
        except OSError:
            continue
        return name
    return None


@functools.cache
def compile_cubin(source: pathlib.Path, architecture: int, **defines: int) -> bytes:
    """Machine code for sm_<architecture>a, which has what this architecture alone can do. Raises ConfigError where there is no NVRTC,
    RuntimeError with the compiler's log."""
    library = nvrtc_library()
    if library is None:
        raise ConfigError("libnvrtc (CUDA's run-time compiler) is not installed")
    nvrtc = ctypes.CDLL(library)
    flags = [f"--gpu-architecture=sm_{architecture}a", "--std=c++17", *(f"-D{name}={value}" for name, value in defines.items())]
    options = (ctypes.c_char_p * len(flags))(*(flag.encode() for flag in flags))
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    created = nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.read_bytes(), source.name.encode(), 0, None, None)
    assert created == 0, f"nvrtcCreateProgram: {created}"
    try:
        result = nvrtc.nvrtcCompileProgram(program, len(flags), options)
        if result != 0:
            nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value)
            nvrtc.nvrtcGetProgramLog(program, log)
            raise RuntimeError(f"{source}: {log.value.decode(errors='replace')}")
        assert nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size)) == 0
        cubin = ctypes.create_string_buffer(size.value)
        assert nvrtc.nvrtcGetCUBIN(program, cubin) == 0
        return cubin.raw
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))

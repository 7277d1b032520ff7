"""Why a backend cannot run on a device, in words for the start-up table; None if it can."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil

import torch

from engine.config import EngineConfig
from engine.ops.cuda_source import nvrtc_library

OLDEST_CAPABILITY = (9, 0)
"""Hopper: FP8 matrix instructions with 2-way accumulation in fp32 and the register file the tile tables assume."""

DEEP_GEMM = "sgl-deep-gemm", "0.1.4"
"""The package whose `deep_gemm` the adapters are for. Some others lack the use_psum_layout of its grouped products, and some were seen to
load beside another torch than theirs and to misread its tensors."""


def cuda(device: torch.device) -> str | None:
    if device.type != "cuda":
        return "needs a GPU"
    if torch.cuda.get_device_capability(device) < OLDEST_CAPABILITY:
        return "needs compute capability 9.0 or newer"
    return None


def triton(device: torch.device) -> str | None:
    reason = cuda(device)
    return reason if reason is not None or importlib.util.find_spec("triton") else "triton is not installed"


def nvrtc(device: torch.device) -> str | None:
    reason = cuda(device)
    return reason if reason is not None or nvrtc_library() else "libnvrtc (CUDA's run-time compiler) is not installed"


def deep_gemm(device: torch.device) -> str | None:
    reason = cuda(device)
    if reason is not None:
        return reason
    if not importlib.util.find_spec("deep_gemm"):
        return "deep_gemm is not installed"
    package, version = DEEP_GEMM
    try:
        found = f"of {package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        found = f"not of {package}"
    if found != f"of {package} {version}":
        return f"deep_gemm is {found}; needs {package} {version}, for use_psum_layout and tensors as torch lays them out"
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    if not (os.access(os.path.join(home, "bin", "nvcc"), os.X_OK) or shutil.which("nvcc")):
        return "deep_gemm compiles its kernels with nvcc, which is not here (CUDA_HOME says where to look)"
    return None


def flash_mla(device: torch.device) -> str | None:
    reason = cuda(device)
    return reason if reason is not None or importlib.util.find_spec("flash_mla") else "flash_mla is not installed"


def deep_ep(device: torch.device) -> str | None:
    reason = cuda(device)
    return reason if reason is not None or importlib.util.find_spec("deep_ep") else "deep_ep is not installed"


def fp8_rows(engine: EngineConfig) -> str | None:
    return None if engine.kv_format == "fp8" else f"needs kv_format fp8, not {engine.kv_format}"


def fp8_index(engine: EngineConfig) -> str | None:
    return None if engine.index_format == "fp8" else f"needs index_format fp8, not {engine.index_format}"

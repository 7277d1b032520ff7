"""Both products of MXFP4 experts with more rows than Triton's kernels are for, on Hopper (hopper.cu)."""

from __future__ import annotations

import ctypes
import functools
import pathlib
from dataclasses import dataclass

import torch

from core.log import get_logger
from engine.ops import requires
from engine.ops.cuda_source import cuda_kernel
from engine.ops.moe_experts.tiles import PackedExperts

log = get_logger("ops")

SOURCE = pathlib.Path(__file__).with_name("hopper.cu")
CAPABILITY = 9, 0
THREADS, SHARED_BYTES = 384, 227 * 1024


@dataclass(frozen=True, slots=True)
class Hopper:
    block_m: int
    """Slots of a block: 64 or 128."""


def serves(experts: PackedExperts) -> bool:
    """Whether these experts, and the GPU that they are on, are what the kernels are for."""
    return experts.fp4 and experts.w2.num_tiles % 2 == 0 and _runs_on(experts.taken.device)


@functools.cache
def _runs_on(device: torch.device) -> bool:
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != CAPABILITY:
        return False
    reason = requires.nvrtc(device)
    if reason is not None:
        log.warning("moe_experts.slower", rows="many", reason=reason)
    return reason is None


def multiply(
    codes: torch.Tensor,
    scales: torch.Tensor,
    scale_strides: tuple[int, int, int],
    blocks: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    top_k: int,
    weights: torch.Tensor | None,
    hidden: torch.Tensor,
    hidden_scales: torch.Tensor,
    out: torch.Tensor,
    experts: PackedExperts,
    limit: float,
    block_m: int,
) -> None:
    """As few.py's kernels, with its arguments; blocks: their pairs and experts, and how many are listed, which counts in rooms only, where
    weights are None. hidden: e4m3 [slots, I] and hidden_scales: fp32 [slots, I / 128] are written on the way."""
    device, w13, w2 = codes.device, experts.w13, experts.w2
    macros = {"BLOCK_M": block_m, "ROOMS": int(weights is None), "SHARED_BYTES": SHARED_BYTES}
    pairs, block_expert, listed = blocks
    most = torch.cuda.get_device_properties(device).multi_processor_count
    hidden_kernel, out_kernel = (
        cuda_kernel(SOURCE, name, device, shared_bytes=SHARED_BYTES, **macros) for name in ("moe_hidden", "moe_out")
    )
    hidden_kernel(
        min(most, len(block_expert) * w13.num_tiles),
        THREADS,
        (
            *(
                codes,
                scales,
                w13.codes,
                w13.scale,
                pairs,
                block_expert,
                listed,
                scales if weights is None else weights,
                hidden,
                hidden_scales,
            ),
            *map(ctypes.c_int, (len(block_expert), w13.num_tiles, w13.k_tiles, top_k, *scale_strides)),
            ctypes.c_float(limit),
        ),
    )
    out_kernel(
        min(most, len(block_expert) * w2.num_tiles // 2),
        THREADS,
        (
            *(hidden, hidden_scales, w2.codes, w2.scale, pairs, block_expert, listed, out),
            *map(ctypes.c_int, (len(block_expert), w2.num_tiles, w2.k_tiles, experts.width, out.stride(-2))),
        ),
    )


CUDA_AOT = [
    (SOURCE, kernel, {"BLOCK_M": block_m, "ROOMS": rooms, "SHARED_BYTES": SHARED_BYTES}, (90,))
    for kernel in ("moe_hidden", "moe_out")
    for block_m in (64, 128)
    for rooms in (0, 1)
]

"""One launch: a cluster of thread blocks a row, radix selection among groups' maxima, then within the groups (kernel.cu)."""

from __future__ import annotations

import ctypes
import pathlib

import torch

from engine.ops.cuda_source import cuda_kernel

SOURCE = pathlib.Path(__file__).with_name("kernel.cu")
THREADS = 1024
SHORTEST, FEW_THREADS = 2048, 256
"""Rows of at most so many scores have blocks of so many threads, several of which share a multiprocessor."""
SHORT = 8192
"""Scores of a row that one block takes without groups."""
LONGEST = 32 * SHORT
MOST = 1024
"""Largest k."""
LARGEST_CLUSTER = 8


def cluster_size(rows: int, num_scores: int, num_sms: int) -> int:
    """Blocks that share a row, a power of two: as many as keep all rows on the GPU at once, and clusters from waiting for each other."""
    if num_scores <= SHORT:
        return 1
    return 1 << (max(1, min(LARGEST_CLUSTER, num_sms // (2 * rows))).bit_length() - 1)


def run(logits: torch.Tensor, num_visible: torch.Tensor, k: int) -> torch.Tensor:
    """As the reference; logits contiguous in rows, no NaN among the visible ones."""
    rows, num_scores = logits.shape
    assert k <= MOST and num_scores <= LONGEST, f"{k=} of {num_scores}, at most {MOST} of {LONGEST}"
    assert logits.dtype == torch.float32 and num_visible.dtype == torch.int64 and num_visible.is_contiguous()
    assert num_scores <= 1 or logits.stride(1) == 1, f"strides {logits.stride()}"
    chosen = torch.empty(rows, k, dtype=torch.int32, device=logits.device)
    if chosen.numel():
        threads = FEW_THREADS if num_scores <= SHORTEST else THREADS
        kernel = cuda_kernel(SOURCE, "index_topk", logits.device, MAX_K=512 if k <= 512 else MOST, THREADS=threads)
        cluster = cluster_size(rows, num_scores, torch.cuda.get_device_properties(logits.device).multi_processor_count)
        numbers = (ctypes.c_longlong(logits.stride(0)), ctypes.c_int(num_scores), ctypes.c_int(k))
        kernel(rows * cluster, threads, (logits, num_visible, chosen, *numbers), cluster)
    return chosen


CUDA_AOT = [
    (SOURCE, "index_topk", {"MAX_K": most, "THREADS": threads}, (90, 100, 103))
    for most in (512, MOST)
    for threads in (FEW_THREADS, THREADS)
]

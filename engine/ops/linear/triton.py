"""Products of few rows with a small bf16 weight: N and K are split over all multiprocessors, in one launch.

cuBLAS takes two launches for such shapes (parts, then their sum); here the last program to arrive at a tile adds the parts, in order.
More rows and large weights go to cuBLAS, one row to triton_vector.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from engine.ops import triton_vector
from engine.ops.linear import cublas
from engine.ops.triton_rounding import INTERPRETED, to_bf16
from engine.ops.triton_splits import is_last, sum_parts

MOST_ROWS = 32
MOST_OUTPUTS = 8192
"""Weights of more rows keep all multiprocessors busy without splitting K."""
BLOCK_N, BLOCK_K = 64, 128
PROGRAMS = 264


@dataclass(frozen=True, slots=True)
class PackedLinear:
    weight: torch.Tensor
    """[N, K], bf16 where that is exact, else fp32."""
    arrived: torch.Tensor
    """int32 [ceil(N / 64)], zeros between calls: programs that have finished their part of a tile."""


@triton.jit(do_not_specialize=["num_rows"])
def linear_few_kernel(
    x_ptr,
    weight_ptr,
    out_ptr,
    scratch_ptr,
    arrived_ptr,
    num_rows,
    n_size,
    k_size,
    k_per_split,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Tile [BLOCK_N weight rows, BLOCK_M rows of x]; split s sums channels [s, s + 1) * k_per_split."""
    tile, split = tl.program_id(0), tl.program_id(1)
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    channel = tl.arange(0, BLOCK_K)
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for start in tl.range(split * k_per_split, tl.minimum((split + 1) * k_per_split, k_size), BLOCK_K, num_stages=NUM_STAGES):
        k = start + channel
        weight = tl.load(
            weight_ptr + n.to(tl.int64)[:, None] * k_size + k[None, :], mask=(n[:, None] < n_size) & (k[None, :] < k_size), other=0.0
        )
        x = tl.load(x_ptr + m[None, :] * k_size + k[:, None], mask=(m[None, :] < num_rows) & (k[:, None] < k_size), other=0.0)
        if INTERPRETED:  # its bf16 arithmetic is wrong
            weight, x = weight.to(tl.float32), x.to(tl.float32)
        total = tl.dot(weight, x, total)
    inside = (m[None, :] < num_rows) & (n[:, None] < n_size)
    if SPLITS > 1:
        own = scratch_ptr + tile * (SPLITS * BLOCK_N * BLOCK_M) + tl.arange(0, BLOCK_N)[:, None] + m[None, :] * BLOCK_N
        tl.store(own + split * (BLOCK_N * BLOCK_M), total, mask=inside)
        if not is_last(arrived_ptr + tile, SPLITS):
            return
        total = sum_parts(own, inside, BLOCK_M, BLOCK_N, SPLITS)
    if out_ptr.dtype.element_ty == tl.bfloat16:
        total = to_bf16(total)
    tl.store(out_ptr + m[None, :] * n_size + n[:, None], total, mask=inside)


def run(x: torch.Tensor, weight: PackedLinear, out_dtype: torch.dtype) -> torch.Tensor:
    """As the reference. bf16 with bf16 runs on the matrix units; any other pair in fp32."""
    flat, (n_size, k_size) = x.flatten(0, -2), weight.weight.shape
    is_bf16 = x.dtype == weight.weight.dtype == torch.bfloat16 and out_dtype in (torch.bfloat16, torch.float32)
    if not is_bf16 or not 0 < len(flat) <= MOST_ROWS or n_size > MOST_OUTPUTS:
        return cublas.run(x, weight.weight, out_dtype)
    if len(flat) == 1:
        out = torch.empty(1, n_size, dtype=out_dtype, device=x.device)
        triton_vector.multiply(flat.contiguous(), weight.weight, None, out)
        return out.unflatten(0, x.shape[:-1])
    rows, tiles, k_tiles = len(flat), len(weight.arrived), triton.cdiv(k_size, BLOCK_K)
    block_m = max(16, triton.next_power_of_2(rows))
    per_split = triton.cdiv(k_tiles, max(1, min(k_tiles // 2, PROGRAMS // tiles, 16)))
    splits = triton.cdiv(k_tiles, per_split)
    out = torch.empty(rows, n_size, dtype=out_dtype, device=x.device)
    scratch = torch.empty(tiles * splits * BLOCK_N * block_m, dtype=torch.float32, device=x.device)
    linear_few_kernel[(tiles, splits)](
        flat.contiguous(),
        weight.weight,
        out,
        scratch,
        weight.arrived,
        rows,
        n_size,
        k_size,
        per_split * BLOCK_K,
        BLOCK_M=block_m,
        BLOCK_N=BLOCK_N,
        BLOCK_K=BLOCK_K,
        SPLITS=splits,
        NUM_STAGES=3,
        num_warps=4,
    )
    return out.unflatten(0, x.shape[:-1])


def pack(weight: torch.Tensor) -> PackedLinear:
    """On the weight's device."""
    packed = cublas.pack(weight).contiguous()
    return PackedLinear(packed, torch.zeros(triton.cdiv(len(packed), BLOCK_N), dtype=torch.int32, device=packed.device))


_SIGNATURE = {"x_ptr": "*bf16", "weight_ptr": "*bf16", "scratch_ptr": "*fp32", "arrived_ptr": "*i32", "num_rows": "i32"}
_SIGNATURE |= {"n_size": "i32:16", "k_size": "i32:16", "k_per_split": "i32:16"}
AOT = [
    (
        linear_few_kernel,
        {**_SIGNATURE, "out_ptr": f"*{out}"},
        {"BLOCK_M": rows, "BLOCK_N": BLOCK_N, "BLOCK_K": BLOCK_K, "SPLITS": splits, "NUM_STAGES": 3},
        {"num_warps": 4},
    )
    for out, rows, splits in (("fp32", 16, 16), ("bf16", 16, 1), ("fp32", 32, 8))
]

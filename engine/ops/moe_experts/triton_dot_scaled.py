"""What Triton's own `dot_scaled` makes of MXFP4 experts: bf16 rows times 4-bit weights, one product. A baseline for BENCH, not a backend.

On Hopper, whose matrix units know no MXFP4, Triton widens the weights to bf16 in registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK_N, BLOCK_K = 128, 128


@triton.jit(do_not_specialize=["rows"])
def dot_scaled_kernel(
    x_ptr, codes_ptr, scale_ptr, out_ptr, rows, n_size, k_size, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    expert = tl.program_id(2).to(tl.int64)
    m, n = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row, column = expert * rows + m, expert * n_size + n
    inside = (m < rows)[:, None]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, k_size, BLOCK_K):
        x = tl.load(x_ptr + row[:, None] * k_size + k + tl.arange(0, BLOCK_K)[None, :], mask=inside, other=0.0)
        codes = tl.load(codes_ptr + column[None, :] * (k_size // 2) + k // 2 + tl.arange(0, BLOCK_K // 2)[:, None])
        scale = tl.load(scale_ptr + column[:, None] * (k_size // 32) + k // 32 + tl.arange(0, BLOCK_K // 32)[None, :])
        total = tl.dot_scaled(x, None, "bf16", codes, scale, "e2m1", total)
    tl.store(out_ptr + row[:, None] * n_size + n[None, :], total.to(out_ptr.dtype.element_ty), mask=inside)


def multiply(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, out: torch.Tensor) -> None:
    """x: bf16 [E, rows, K]; codes: uint8 [E, N, K / 2]; scale: uint8 [E, N, K / 32]; out: bf16 [E, rows, N]; N and K multiples of 128."""
    experts, rows, k_size = x.shape
    n_size, block = codes.shape[1], max(16, min(64, triton.next_power_of_2(rows)))
    grid = (triton.cdiv(rows, block), n_size // BLOCK_N, experts)
    dot_scaled_kernel[grid](
        x, codes, scale, out, rows, n_size, k_size, BLOCK_M=block, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, num_warps=4, num_stages=3
    )


AOT = [
    (
        dot_scaled_kernel,
        {
            "x_ptr": "*bf16",
            "codes_ptr": "*u8",
            "scale_ptr": "*u8",
            "out_ptr": "*bf16",
            "rows": "i32",
            "n_size": "i32:16",
            "k_size": "i32:16",
        },
        {"BLOCK_M": rows, "BLOCK_N": BLOCK_N, "BLOCK_K": BLOCK_K},
        {"num_warps": 4, "num_stages": 3},
    )
    for rows in (16, 64)
]

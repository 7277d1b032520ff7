"""Products of one row with a weight, without matrix units: a program takes a few rows of the weight and all of their channels.

All of the weight is asked for at once, by programs that wait for nobody: no parts of sums go through memory, and nothing is counted.
Matrix units would compute with 16 rows where there is one. x may consist of groups, one for each so many rows of the weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from engine.model.quantized import FP8_BLOCK
from engine.ops.triton_rounding import quantize, to_bf16

BLOCK = tl.constexpr(FP8_BLOCK)


@dataclass(frozen=True, slots=True)
class Config:
    outputs: int
    """Of a program: a power of two up to 128."""
    channels: int
    """At a time: a power of two; in FP8 it divides their number."""
    warps: int


def choose(outputs: int, channels: int, is_fp8: bool, x_is_fp8: bool = False) -> Config:
    """Of a weight [outputs, channels], in FP8 or not. What was fastest on an H200 for weights of 1024 to 4096 channels, or nearly so."""
    if not is_fp8:
        return Config(2, min(4096, triton.next_power_of_2(channels)), 8)
    if x_is_fp8:
        most = min(4096 if outputs < 4096 else 2048, channels & -channels)
        codes = 128 if most == channels else 64  # of a thread at a time: more where that is all
        return Config(4, most, max(1, 4 * most // (32 * codes)))
    if channels % 4096 == 0 and outputs <= 4096:
        return Config(4, 4096, 4)
    return Config(4, min(1024, channels & -channels), 2)


@triton.jit
def vector_kernel(
    x_ptr, x_scale_ptr, weight_ptr, scale_ptr, out_ptr, n_size, k_size, padded_k, group_rows, x_scale_stride,
    N: tl.constexpr, K: tl.constexpr, FP8: tl.constexpr, QUANTISED: tl.constexpr,
):  # fmt: skip
    """out [n_size] of N rows of the weight [.., padded_k]. FP8: with fp32 scales of 128 x 128; QUANTISED: x, too, per 128 channels, here
    unless it is [padded_k] codes already, of one group."""
    first = tl.program_id(0) * N
    n, k, group = first + tl.arange(0, N), tl.arange(0, K), tl.arange(0, K // BLOCK if FP8 else 1)
    x_ptr += (first // group_rows) * k_size
    rows = weight_ptr + n.to(tl.int64)[:, None] * padded_k + k[None, :]
    scales = scale_ptr + first // BLOCK * (padded_k // BLOCK) + group
    total = tl.zeros([N], tl.float32)
    for start in range(0, padded_k, K):
        if x_ptr.dtype.element_ty == tl.float8e4nv:
            x = tl.load(x_ptr + start + k).to(tl.float32)
        else:
            x = tl.load(x_ptr + start + k, mask=start + k < k_size, other=0.0).to(tl.float32)
        if FP8:
            weight = tl.load(rows + start)
            x, scale = tl.reshape(x, [K // BLOCK, BLOCK]), tl.load(scales + start // BLOCK)[:, None]
            if x_ptr.dtype.element_ty == tl.float8e4nv:
                x *= tl.load(x_scale_ptr + (start // BLOCK + group) * x_scale_stride)[:, None] * scale
            elif QUANTISED:
                codes, x_scale = quantize(x, 1)
                x = codes.to(tl.float32) * (x_scale * scale)
            else:
                x *= scale
            x = tl.reshape(x, [K])
        else:
            weight = tl.load(rows + start, mask=(n < n_size)[:, None] & (start + k < k_size)[None, :], other=0.0)
        total += tl.sum(weight.to(tl.float32) * x[None, :], 1)
    if out_ptr.dtype.element_ty == tl.bfloat16:
        total = to_bf16(total)
    tl.store(out_ptr + n, total, mask=n < n_size)


def multiply(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    out: torch.Tensor,
    *,
    groups: int = 1,
    x_scale: torch.Tensor | None = None,
    is_quantised: bool = False,
) -> None:
    """x: [1, groups, K] or [1, K], contiguous. weight: bf16 [N, K]; or e4m3 codes [N', K'], padded to multiples of 128, and `scale`:
    fp32 [N' / 128, K' / 128]. `is_quantised`: x is rounded to FP8, too, or is [1, K'] in FP8 with `x_scale`, fp32 [1, K' / 128].
    out: [1, N]; groups have equal parts of N."""
    n_size, padded_k = out.shape[1], weight.shape[1]
    assert len(x) == 1 and n_size % groups == 0, f"{x.shape=} {out.shape=}"
    config = choose(n_size, padded_k, scale is not None, x.dtype == torch.float8_e4m3fn)
    group_rows = n_size // groups
    outputs = config.outputs if groups == 1 else min(config.outputs, group_rows & -group_rows)
    vector_kernel[(triton.cdiv(n_size, outputs),)](
        x,
        x if x_scale is None else x_scale,
        weight,
        out if scale is None else scale,
        out,
        n_size,
        x.shape[-1],
        padded_k,
        group_rows,
        0 if x_scale is None else x_scale.stride(1),
        N=outputs,
        K=config.channels,
        FP8=scale is not None,
        QUANTISED=is_quantised,
        num_warps=config.warps,
    )


_SIGNATURE = dict.fromkeys(("n_size", "k_size", "padded_k", "group_rows"), "i32:16") | {"x_scale_stride": "i32"}
_SIGNATURE |= {"x_scale_ptr": "*fp32", "scale_ptr": "*fp32"}
AOT = [
    (
        vector_kernel,
        _SIGNATURE | {"x_ptr": x, "weight_ptr": "*fp8e4nv" if is_fp8 else "*bf16", "out_ptr": out},
        {"N": config.outputs, "K": config.channels, "FP8": is_fp8, "QUANTISED": quantised},
        {"num_warps": config.warps},
    )
    for is_fp8, x, out, quantised, outputs, channels in (
        (True, "*bf16", "*bf16", True, 4096, 4096),
        (True, "*bf16", "*bf16", True, 4096, 1024),
        (True, "*fp8e4nv", "*bf16", True, 32768, 1024),
        (True, "*fp8e4nv", "*bf16", True, 4096, 2048),
        (True, "*fp8e4nv", "*bf16", True, 4096, 4096),
        (True, "*fp8e4nv", "*bf16", True, 1536, 4096),
        (True, "*bf16", "*bf16", False, 8192, 4096),
        (False, "*bf16", "*fp32", False, 256, 4096),
        (False, "*bf16", "*bf16", False, 256, 4096),
    )
    for config in (choose(outputs, channels, is_fp8, x == "*fp8e4nv"),)
]

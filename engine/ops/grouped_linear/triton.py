"""FP8 weights stay in FP8: widened in registers where few tokens make their bytes count, and for many before a product of cuBLAS.

Their values are exact in bf16, so nothing is rounded that the definition does not round. `widen` keeps them in bf16 as well.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from engine.model.quantized import FP8_BLOCK, QuantizedWeight, Weight, exp2_of_byte
from engine.ops import triton_vector
from engine.ops.grouped_linear import FEW_TOKENS

MOST_STREAMED = 512
"""Tokens up to which weights are widened in registers, for each block of 64 tokens anew; above, once, for a product of cuBLAS."""
COLUMNS = 32
"""Output columns of a program: with 8 groups of 1024 that makes 256 programs."""


@dataclass(frozen=True, slots=True)
class PackedGroups:
    codes: torch.Tensor
    """e4m3 [G, N, K]; or the weight itself, bf16."""
    scale: torch.Tensor | None
    """fp32 [G, N / 128, K / 128]."""
    wide: torch.Tensor | None = None
    """bf16 [G, N, K]: the same values, for more than FEW_TOKENS tokens."""

    @property
    def widening_bytes(self) -> int:
        """How many more `widen` would take."""
        return 0 if self.scale is None or self.wide is not None else 2 * self.codes.numel()


@triton.jit(do_not_specialize=["num_tokens"])
def grouped_linear_kernel(
    x_ptr, codes_ptr, scale_ptr, out_ptr, num_tokens, token_stride, groups, rows, columns,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Program (group, block of weight rows, block of tokens)."""
    group, token = tl.program_id(0).to(tl.int64), tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
    row, k = tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    real = (token < num_tokens)[:, None]
    x_at = x_ptr + token.to(tl.int64)[:, None] * token_stride + group * columns + k[None, :]
    codes_at = codes_ptr + (group * rows + row)[:, None] * columns + k[None, :]
    scale_at = scale_ptr + (group * (rows // BLOCK) + tl.program_id(1) * ROWS // BLOCK) * (columns // BLOCK)
    acc = tl.zeros([TOKENS, ROWS], tl.float32)
    for block in range(columns // BLOCK):
        x = tl.load(x_at + block * BLOCK, mask=real, other=0.0).to(tl.float32).to(DOT)
        codes = tl.load(codes_at + block * BLOCK).to(tl.float32).to(DOT)
        acc += tl.dot(x, tl.trans(codes), input_precision="ieee") * tl.load(scale_at + block)
    tl.store(out_ptr + (token.to(tl.int64)[:, None] * groups + group) * rows + row[None, :], acc, mask=real)


def run(x: torch.Tensor, weight: PackedGroups) -> torch.Tensor:
    tokens, groups, columns = x.shape
    rows = weight.codes.shape[1]
    out = torch.empty(tokens, groups, rows, dtype=x.dtype, device=x.device)
    if weight.scale is None or tokens > (MOST_STREAMED if weight.wide is None else FEW_TOKENS):
        torch.bmm(x.transpose(0, 1), _widened(weight).transpose(1, 2), out=out.transpose(0, 1))  # cuBLAS writes rows this far apart
    elif tokens == 1:
        codes, scale = weight.codes.flatten(0, 1), weight.scale.flatten(0, 1)
        triton_vector.multiply(x.contiguous(), codes, scale, out.flatten(1), groups=groups)
    elif tokens:
        x = x.contiguous()
        block = 16 if tokens <= 16 else 32 if tokens <= 32 else 64
        grouped_linear_kernel[(groups, rows // COLUMNS, triton.cdiv(tokens, block))](
            x, weight.codes, weight.scale, out, tokens, x.stride(0), groups, rows, columns,
            TOKENS=block, ROWS=COLUMNS, BLOCK=FP8_BLOCK, DOT=tl.bfloat16 if x.is_cuda else tl.float32, num_warps=4, num_stages=4,
        )  # fmt: skip
    return out


@triton.jit
def widen_kernel(codes_ptr, scale_ptr, out_ptr, columns, BLOCK: tl.constexpr):
    """Program (row block, column block): one scale each."""
    row, column = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    scale = tl.load(scale_ptr + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1))
    at = row[:, None] * columns + column[None, :]
    tl.store(out_ptr + at, tl.load(codes_ptr + at).to(tl.float32) * scale)


def _widened(weight: PackedGroups) -> torch.Tensor:
    """bf16 [G, N, K]."""
    if weight.scale is None:
        return weight.codes
    if weight.wide is not None:
        return weight.wide
    groups, rows, columns = weight.codes.shape
    out = torch.empty(weight.codes.shape, dtype=torch.bfloat16, device=weight.codes.device)
    grid = (groups * rows // FP8_BLOCK, columns // FP8_BLOCK)
    widen_kernel[grid](weight.codes, weight.scale, out, columns, BLOCK=FP8_BLOCK, num_warps=8)
    return out


def widen(weight: PackedGroups) -> PackedGroups:
    """The weights in bf16 besides."""
    return dataclasses.replace(weight, wide=_widened(weight)) if weight.widening_bytes else weight


def pack(weight: Weight, groups: int) -> PackedGroups:
    if (
        not isinstance(weight, QuantizedWeight)
        or weight.kind != "fp8"
        or weight.shape[0] % (groups * FP8_BLOCK)
        or weight.shape[1] % FP8_BLOCK
    ):
        plain = weight.dequantize(torch.bfloat16) if isinstance(weight, QuantizedWeight) else weight.bfloat16()
        return PackedGroups(plain.unflatten(0, (groups, -1)).contiguous(), None)
    codes, scale = (part.unflatten(0, (groups, -1)).contiguous() for part in (weight.data, exp2_of_byte(weight.scale)))
    return PackedGroups(codes, scale)


_SIGNATURE = {
    "x_ptr": "*bf16", "codes_ptr": "*fp8e4nv", "scale_ptr": "*fp32", "out_ptr": "*bf16", "num_tokens": "i32", "token_stride": "i64",
    "groups": "i32", "rows": "i32", "columns": "i32",
}  # fmt: skip
AOT = [
    (
        grouped_linear_kernel,
        _SIGNATURE,
        {"TOKENS": tokens, "ROWS": COLUMNS, "BLOCK": FP8_BLOCK, "DOT": tl.bfloat16},
        {"num_warps": 4, "num_stages": 4},
    )
    for tokens in (16, 32, 64)
] + [
    (widen_kernel, {"codes_ptr": "*fp8e4nv", "scale_ptr": "*fp32", "out_ptr": "*bf16", "columns": "i32"}, {"BLOCK": 128}, {"num_warps": 8})
]

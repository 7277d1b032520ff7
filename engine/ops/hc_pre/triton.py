"""Hyper-connections in Triton: what hc_pre, hc_post_pre and hc_head share.

    project    a block of tokens x a slice of channels: [the previous sublayer's post, which writes the new streams,] the slice's part
               of the projection by fn and of the sum of squares                        -> partials [T, splits, 32] fp32
    mix        a token: sum of its partials, pre gates, mix of the streams, RMSNorm     -> x [, x in FP8]
    balance    a block of tokens: sum of their partials, post gates, Sinkhorn           -> post, comb

Two launches: project, then mix and balance side by side. A slice is cut over all four streams, so a program that makes new streams
has all it needs to project them. (One launch with a barrier of the grid in it was no faster, up to 64 tokens.)

fn is packed as two bfloat16 matrices, rows interleaved, whose sum keeps 16 bits of each weight, and with the four streams of a channel
side by side: a step of `project` is one product of the matrix units, exact in their fp32 accumulators.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from engine.model.quantized import FP8_BLOCK, QuantizedRows
from engine.ops.hc_pre.triton_balance import balance, balance_token
from engine.ops.triton_rounding import quantize

STREAMS = 4
BLOCK = tl.constexpr(FP8_BLOCK)


@triton.jit
def _gates(post_ptr, comb_ptr, row, alive, K: tl.constexpr):
    """What makes new stream K of a block of tokens: post[K], comb[0..3, K]."""
    return (
        tl.load(post_ptr + row * 4 + K, mask=alive, other=0.0),
        tl.load(comb_ptr + row * 16 + K, mask=alive, other=0.0),
        tl.load(comb_ptr + row * 16 + 4 + K, mask=alive, other=0.0),
        tl.load(comb_ptr + row * 16 + 8 + K, mask=alive, other=0.0),
        tl.load(comb_ptr + row * 16 + 12 + K, mask=alive, other=0.0),
    )


@triton.jit
def _spread(gates, y, h0, h1, h2, h3):
    post, c0, c1, c2, c3 = gates
    return post[:, None] * y + c0[:, None] * h0 + c1[:, None] * h1 + c2[:, None] * h2 + c3[:, None] * h3


@triton.jit
def _mix(
    h_ptr, partial_ptr, base_ptr, scale_ptr, norm_ptr, x_ptr, codes_ptr, x_scale_ptr, token, dim, num_splits, x_scale_stride,
    norm_eps, hc_eps,
    N: tl.constexpr, WIDTH: tl.constexpr, NORM: tl.constexpr, SPLITS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    token = token.to(tl.int64)
    j = tl.arange(0, 4)
    channel = tl.arange(0, BD)
    kept = channel < dim
    split = tl.arange(0, SPLITS)
    real = split < num_splits
    at = partial_ptr + (token * num_splits + split) * WIDTH
    # All that is read is asked for before the first sum, which no later load would pass.
    sums = tl.load(at[:, None] + j[None, :], mask=real[:, None], other=0.0)
    square = tl.load(at + N, mask=real, other=0.0)
    scale, base = tl.load(scale_ptr), tl.load(base_ptr + j)
    streams = tl.load(h_ptr + (token * 4 + j[:, None]) * dim + channel[None, :], mask=kept[None, :], other=0.0)
    if NORM:
        weight = tl.load(norm_ptr + channel, mask=kept, other=0.0)
    rho = tl.rsqrt(tl.sum(square, 0) / (4 * dim) + norm_eps)
    gate = tl.sigmoid(tl.sum(sums, 0) * rho * scale + base) + hc_eps
    x = tl.sum(streams.to(tl.float32) * gate[:, None], 0).to(streams.dtype)
    if NORM:
        wide = x.to(tl.float32)
        x = (wide * tl.rsqrt(tl.sum(wide * wide, 0) / dim + norm_eps) * weight.to(tl.float32)).to(streams.dtype)
    tl.store(x_ptr + token * dim + channel, x, mask=kept)
    if codes_ptr.dtype.element_ty == tl.float8e4nv:
        codes, x_scale = quantize(tl.reshape(x.to(tl.float32), [BD // BLOCK, BLOCK]), 1)
        group = tl.arange(0, BD // BLOCK)[:, None]
        real = group < tl.cdiv(dim, BLOCK)
        at = (token * tl.cdiv(dim, BLOCK) + group) * BLOCK + tl.arange(0, BLOCK)[None, :]
        tl.store(codes_ptr + at, codes, mask=real)
        tl.store(x_scale_ptr + token + group * x_scale_stride, x_scale, mask=real)


@triton.jit(do_not_specialize=["tokens", "num_splits"])
def project_kernel(
    h_ptr, y_ptr, more_ptr, post_ptr, comb_ptr, out_ptr, fn_ptr, partial_ptr, tokens, dim, num_splits,
    N: tl.constexpr, PADDED_ROWS: tl.constexpr, POST: tl.constexpr, MORE: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(0)
    row = (tl.program_id(1) * BT + tl.arange(0, BT)).to(tl.int64)
    alive = row < tokens
    acc = tl.zeros([BT, PADDED_ROWS], tl.float32)
    squares = tl.zeros([BT, BC], tl.float32)
    n = tl.arange(0, PADDED_ROWS)
    if POST:
        gates0 = _gates(post_ptr, comb_ptr, row, alive, 0)
        gates1 = _gates(post_ptr, comb_ptr, row, alive, 1)
        gates2 = _gates(post_ptr, comb_ptr, row, alive, 2)
        gates3 = _gates(post_ptr, comb_ptr, row, alive, 3)
    # The splits of a block take turns, so that programs that run side by side read and write side by side.
    for start in range(split * BC, dim, num_splits * BC):
        columns = start + tl.arange(0, BC)
        kept = columns < dim
        mask = alive[:, None] & kept[None, :]
        at = row[:, None] * (4 * dim) + columns[None, :]
        s0 = tl.load(h_ptr + at, mask=mask, other=0.0)
        s1 = tl.load(h_ptr + at + dim, mask=mask, other=0.0)
        s2 = tl.load(h_ptr + at + 2 * dim, mask=mask, other=0.0)
        s3 = tl.load(h_ptr + at + 3 * dim, mask=mask, other=0.0)
        if POST:
            kind = s0.dtype
            y_at = row[:, None] * dim + columns[None, :]
            y = tl.load(y_ptr + y_at, mask=mask, other=0.0).to(tl.float32)
            if MORE:
                y = (y + tl.load(more_ptr + y_at, mask=mask, other=0.0).to(tl.float32)).to(kind).to(tl.float32)
            h0, h1, h2, h3 = s0.to(tl.float32), s1.to(tl.float32), s2.to(tl.float32), s3.to(tl.float32)
            s0 = _spread(gates0, y, h0, h1, h2, h3).to(kind)
            s1 = _spread(gates1, y, h0, h1, h2, h3).to(kind)
            s2 = _spread(gates2, y, h0, h1, h2, h3).to(kind)
            s3 = _spread(gates3, y, h0, h1, h2, h3).to(kind)
            tl.store(out_ptr + at, s0, mask=mask)
            tl.store(out_ptr + at + dim, s1, mask=mask)
            tl.store(out_ptr + at + 2 * dim, s2, mask=mask)
            tl.store(out_ptr + at + 3 * dim, s3, mask=mask)
        # K runs over channels, the four streams of each side by side, as fn is packed: one product a step
        x = tl.reshape(tl.join(tl.join(s0, s2), tl.join(s1, s3)), [BT, 4 * BC])
        k = start * 4 + tl.arange(0, 4 * BC)
        real = (k < 4 * dim)[:, None] & (n < 2 * N)[None, :]
        part = tl.load(fn_ptr + n[None, :] * (4 * dim) + k[:, None], mask=real, other=0.0)
        if x.dtype == tl.bfloat16:
            acc = tl.dot(x, part, acc)
        else:
            acc = tl.dot(x, part.to(tl.float32), acc, input_precision="tf32x3")
        h0, h1, h2, h3 = s0.to(tl.float32), s1.to(tl.float32), s2.to(tl.float32), s3.to(tl.float32)
        squares += h0 * h0 + h1 * h1 + h2 * h2 + h3 * h3
    WIDTH: tl.constexpr = PADDED_ROWS // 2
    column = tl.arange(0, WIDTH)[None, :]
    out = tl.sum(tl.reshape(acc, [BT, WIDTH, 2]), axis=2)
    out = tl.where(column == N, tl.sum(squares, 1)[:, None], out)
    tl.store(partial_ptr + (row[:, None] * num_splits + split) * WIDTH + column, out, mask=alive[:, None] & (column <= N))


@triton.jit(do_not_specialize=["tokens", "num_splits", "balance_blocks", "x_scale_stride"])
def finish_kernel(
    h_ptr, partial_ptr, base_ptr, scale_ptr, norm_ptr, x_ptr, codes_ptr, x_scale_ptr, post_ptr, comb_ptr, tokens, dim, num_splits,
    balance_blocks, x_scale_stride, norm_eps, hc_eps, iterations,
    N: tl.constexpr, WIDTH: tl.constexpr, NORM: tl.constexpr, SPLITS: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    if program < balance_blocks:
        if BT == 1:
            balance_token(
                partial_ptr, base_ptr, scale_ptr, post_ptr, comb_ptr, program, dim, num_splits, norm_eps, hc_eps, iterations,
                N, WIDTH, SPLITS, FAST,
            )  # fmt: skip
        else:
            balance(
                partial_ptr, base_ptr, scale_ptr, post_ptr, comb_ptr, program, tokens, dim, num_splits, norm_eps, hc_eps, iterations,
                N, WIDTH, SPLITS, BT,
            )  # fmt: skip
    else:  # the last tokens first: of what `project` read or wrote, those are still in L2
        _mix(
            h_ptr, partial_ptr, base_ptr, scale_ptr, norm_ptr, x_ptr, codes_ptr, x_scale_ptr, tokens - 1 - (program - balance_blocks),
            dim, num_splits, x_scale_stride, norm_eps, hc_eps, N, WIDTH, NORM, SPLITS, BD,
        )  # fmt: skip


def pack(fn: torch.Tensor) -> torch.Tensor:
    """float [N, M d] -> bfloat16 [2 N, d M]: row 2 n is fn[n] rounded, row 2 n + 1 what that leaves, rounded."""
    wide = fn.float().unflatten(1, (STREAMS, -1)).transpose(1, 2).flatten(1)
    high = wide.to(torch.bfloat16)
    return torch.stack((high, (wide - high.float()).to(torch.bfloat16)), dim=1).flatten(0, 1).contiguous()


@dataclass(frozen=True, slots=True)
class Cut:
    """How the tokens and channels of `project` are cut into programs, and the widths of the rest."""

    block: int
    """Tokens of a program of `project`."""
    channels: int
    """Of each stream, per step of its loop."""
    num_splits: int
    """Programs that share the channels of a block."""
    num_warps: int
    num_stages: int
    finish_warps: int

    def num_blocks(self, tokens: int) -> int:
        return -(-tokens // self.block)


def cut(tokens: int, dim: int, dtype: torch.dtype) -> Cut:
    """Few tokens: thin slices, so that one token's work, the reading of fn, is spread over the whole chip. Measured on an H200."""
    block = 16 if tokens <= 16 else 64
    channels = 32 if dtype == torch.bfloat16 else 16
    splits = min(-(-dim // channels), max(8, 256 // max(1, -(-tokens // block))))
    return Cut(block, channels, splits, 2 if tokens <= 8 else 4, 2 if tokens <= 128 or dtype == torch.float32 else 3, 4)


def _balance_block(tokens: int) -> int:
    """Tokens of a program of `balance`: with few tokens there are many partials of each."""
    return 1 if tokens <= 256 else 16 if tokens <= 1024 else 64


def launch(
    h: torch.Tensor,
    after: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor] | None,
    fn: torch.Tensor,
    base: torch.Tensor,
    scale: torch.Tensor,
    norm_weight: torch.Tensor | None,
    eps: tuple[float, float],
    iterations: int,
    cut: Cut,
    is_quantized: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, QuantizedRows | None, torch.Tensor, torch.Tensor]:
    """`after`: (y, more, post, comb) of the sublayer before. `eps`: of the norm, of hc. `iterations` 0: no post and comb (hc_head).

    Returns (streams: new ones if `after`, else h; x; x in FP8, if `is_quantized`; post; comb)."""
    tokens, mult, dim = h.shape
    assert mult == STREAMS and h.is_contiguous() and dim % 16 == 0 and h.dtype in (torch.bfloat16, torch.float32), f"{h.shape} {h.dtype}"
    num, rows = len(fn) // 2, max(16, triton.next_power_of_2(len(fn)))
    assert fn.shape[1] == mult * dim and fn.dtype == torch.bfloat16 and fn.is_contiguous(), f"{fn.shape} {fn.dtype}: not packed?"
    x = h.new_empty(tokens, dim)
    rows_of_x = QuantizedRows.empty(tokens, dim, h.dtype, h.device) if is_quantized else None
    post = h.new_empty(tokens, mult, dtype=torch.float32)
    comb = h.new_empty(tokens, mult, mult, dtype=torch.float32)
    streams = h if after is None else torch.empty_like(h)
    if not tokens:
        return streams, x, rows_of_x, post, comb
    y, more, in_post, in_comb = after or (h, None, post, comb)
    assert y.is_contiguous() and (more is None or more.is_contiguous()) and in_post.is_contiguous() and in_comb.is_contiguous()
    partial = h.new_empty(tokens, cut.num_splits, rows // 2, dtype=torch.float32)
    blocks, norm = cut.num_blocks(tokens), h if norm_weight is None else norm_weight
    padded = max(triton.next_power_of_2(dim), FP8_BLOCK if is_quantized else 1)
    splits = {"SPLITS": triton.next_power_of_2(cut.num_splits), "BD": padded, "NORM": norm_weight is not None}
    codes, x_scale, x_scale_stride = (x, x, 0) if rows_of_x is None else (rows_of_x.codes, rows_of_x.scale, rows_of_x.scale.stride(1))
    shared = {"N": num, "PADDED_ROWS": rows, "POST": after is not None, "MORE": more is not None}
    project_kernel[(cut.num_splits, blocks)](
        h, y, y if more is None else more, in_post, in_comb, streams, fn, partial, tokens, dim, cut.num_splits, **shared,
        BT=cut.block, BC=cut.channels, num_warps=cut.num_warps, num_stages=cut.num_stages,
    )  # fmt: skip
    balance_block = _balance_block(tokens)
    balance_blocks = -(-tokens // balance_block) if iterations else 0
    finish_kernel[(tokens + balance_blocks,)](
        streams, partial, base, scale, norm, x, codes, x_scale, post, comb, tokens, dim, cut.num_splits, balance_blocks, x_scale_stride,
        *eps, iterations,
        N=num, WIDTH=rows // 2, **splits, BT=balance_block, FAST=h.is_cuda, num_warps=cut.finish_warps,
    )  # fmt: skip
    return streams, x, rows_of_x, post, comb


def run(
    h: torch.Tensor,
    fn: torch.Tensor,
    base: torch.Tensor,
    scale: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_eps: float,
    hc_eps: float,
    sinkhorn_iters: int,
    is_quantized: bool = False,
) -> tuple[torch.Tensor, QuantizedRows | None, torch.Tensor, torch.Tensor]:
    """As the reference, with packed fn and contiguous h."""
    tokens, _, dim = h.shape
    plan = cut(tokens, dim, h.dtype)
    return launch(h, None, fn, base, scale, norm_weight, (norm_eps, hc_eps), sinkhorn_iters, plan, is_quantized)[1:]


def _aot(dtype: str, post: bool, num: int, dim: int, tokens: int, more: bool = False, is_quantized: bool = False) -> list[tuple[Any, ...]]:
    plan = cut(tokens, dim, torch.bfloat16 if dtype == "*bf16" else torch.float32)
    rows = max(16, triton.next_power_of_2(2 * num))
    streams = dict.fromkeys(("h_ptr", "more_ptr", "out_ptr", "x_ptr"), dtype) | {"y_ptr": "*fp32" if more else dtype}
    floats = dict.fromkeys(("post_ptr", "comb_ptr", "partial_ptr", "base_ptr", "scale_ptr"), "*fp32")
    streams |= {"codes_ptr": "*fp8e4nv", "x_scale_ptr": "*fp32"} if is_quantized else {"codes_ptr": dtype, "x_scale_ptr": dtype}
    integers = dict.fromkeys(("tokens", "num_splits", "balance_blocks", "x_scale_stride", "iterations"), "i32")
    types = streams | floats | integers | {"dim": "i32:16", "norm_eps": "fp32", "hc_eps": "fp32"}
    types |= {"fn_ptr": "*bf16", "norm_ptr": "*bf16"}
    constants = {"N": num, "PADDED_ROWS": rows, "WIDTH": rows // 2, "POST": post, "NORM": num != STREAMS, "BT": plan.block, "FAST": True}
    constants |= {"MORE": more, "BC": plan.channels, "BD": triton.next_power_of_2(dim), "SPLITS": triton.next_power_of_2(plan.num_splits)}

    def entry(kernel: triton.JITFunction, warps: int, **changed: int):
        used = {name: value for name, value in (constants | changed).items() if name in kernel.arg_names}
        return (
            kernel,
            {name: types[name] for name in kernel.arg_names if name not in used},
            used,
            {"num_warps": warps, "num_stages": plan.num_stages},
        )

    return [entry(project_kernel, plan.num_warps), entry(finish_kernel, plan.finish_warps, BT=_balance_block(tokens))]


AOT = [
    *_aot("*bf16", False, 24, 4096, 1),
    *_aot("*bf16", True, 24, 7168, 64),
    *_aot("*fp32", True, 24, 256, 1),
    *_aot("*fp32", True, 24, 1024, 300),
    *_aot("*bf16", False, 24, 4096, 8192),
    *_aot("*bf16", True, 24, 7168, 8192, more=True),
    *_aot("*bf16", True, 24, 4096, 1, more=True, is_quantized=True),
    *_aot("*bf16", True, 24, 7168, 8192, is_quantized=True),
    *_aot("*bf16", False, 4, 4096, 128),
]

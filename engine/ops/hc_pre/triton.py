"""Hyper-connections in Triton: what hc_pre, hc_post_pre and hc_head share.

    project    a block of tokens x a slice of channels: [the previous sublayer's post, which writes the new streams,] the slice's part
               of the projection by fn and of the sum of squares                        -> partials [T, splits, 32] fp32
    mix        a token: sum of its partials, pre gates, mix of the streams, RMSNorm     -> x
    balance    a block of tokens: sum of their partials, post gates, Sinkhorn           -> post, comb

All three in one launch while there are few tokens (a grid small enough to be resident as a whole, with one barrier between project
and the rest), else in two: project, then mix and balance side by side. A slice is cut over all four streams, so a program that makes
new streams has all it needs to project them.

fn is packed as two bfloat16 matrices, rows interleaved, whose sum keeps 16 bits of each weight; bfloat16 streams times these are exact
in the fp32 accumulators, in one pass of the matrix units.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

STREAMS = 4
FUSED_TOKENS = 64
"""Up to here one launch: 2 programs a token for mix and balance, which must all be resident."""


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
def _accumulate(acc, squares, stream, fn_ptr, at, row_stride, columns, kept, ROWS: tl.constexpr, PADDED_ROWS: tl.constexpr):
    """acc += stream x fn[:, at + columns]^T, squares += stream^2. stream: [BT, BC] bf16 or fp32."""
    n = tl.arange(0, PADDED_ROWS)
    part = tl.load(fn_ptr + n[None, :] * row_stride + (at + columns)[:, None], mask=kept[:, None] & (n < ROWS)[None, :], other=0.0)
    wide = stream.to(tl.float32)
    if stream.dtype == tl.bfloat16:
        acc = tl.dot(stream, part, acc)
    else:
        acc = tl.dot(wide, part.to(tl.float32), acc, input_precision="tf32x3")
    return acc, squares + wide * wide


@triton.jit
def _project(
    h_ptr, y_ptr, post_ptr, comb_ptr, out_ptr, fn_ptr, partial_ptr, tokens, dim, block, split, num_splits, split_channels,
    N: tl.constexpr, PADDED_ROWS: tl.constexpr, POST: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    row = (block * BT + tl.arange(0, BT)).to(tl.int64)
    alive = row < tokens
    acc = tl.zeros([BT, PADDED_ROWS], tl.float32)
    squares = tl.zeros([BT, BC], tl.float32)
    first = split * split_channels
    last = tl.minimum(first + split_channels, dim)
    if POST:
        gates0 = _gates(post_ptr, comb_ptr, row, alive, 0)
        gates1 = _gates(post_ptr, comb_ptr, row, alive, 1)
        gates2 = _gates(post_ptr, comb_ptr, row, alive, 2)
        gates3 = _gates(post_ptr, comb_ptr, row, alive, 3)
    for start in range(first, last, BC):
        columns = start + tl.arange(0, BC)
        kept = columns < last
        mask = alive[:, None] & kept[None, :]
        at = row[:, None] * (4 * dim) + columns[None, :]
        s0 = tl.load(h_ptr + at, mask=mask, other=0.0)
        s1 = tl.load(h_ptr + at + dim, mask=mask, other=0.0)
        s2 = tl.load(h_ptr + at + 2 * dim, mask=mask, other=0.0)
        s3 = tl.load(h_ptr + at + 3 * dim, mask=mask, other=0.0)
        if POST:
            y = tl.load(y_ptr + row[:, None] * dim + columns[None, :], mask=mask, other=0.0).to(tl.float32)
            kind = s0.dtype
            h0, h1, h2, h3 = s0.to(tl.float32), s1.to(tl.float32), s2.to(tl.float32), s3.to(tl.float32)
            s0 = _spread(gates0, y, h0, h1, h2, h3).to(kind)
            s1 = _spread(gates1, y, h0, h1, h2, h3).to(kind)
            s2 = _spread(gates2, y, h0, h1, h2, h3).to(kind)
            s3 = _spread(gates3, y, h0, h1, h2, h3).to(kind)
            tl.store(out_ptr + at, s0, mask=mask)
            tl.store(out_ptr + at + dim, s1, mask=mask)
            tl.store(out_ptr + at + 2 * dim, s2, mask=mask)
            tl.store(out_ptr + at + 3 * dim, s3, mask=mask)
        acc, squares = _accumulate(acc, squares, s0, fn_ptr, 0, 4 * dim, columns, kept, 2 * N, PADDED_ROWS)
        acc, squares = _accumulate(acc, squares, s1, fn_ptr, dim, 4 * dim, columns, kept, 2 * N, PADDED_ROWS)
        acc, squares = _accumulate(acc, squares, s2, fn_ptr, 2 * dim, 4 * dim, columns, kept, 2 * N, PADDED_ROWS)
        acc, squares = _accumulate(acc, squares, s3, fn_ptr, 3 * dim, 4 * dim, columns, kept, 2 * N, PADDED_ROWS)
    WIDTH: tl.constexpr = PADDED_ROWS // 2
    n = tl.arange(0, WIDTH)
    out = tl.sum(tl.reshape(acc, [BT, WIDTH, 2]), axis=2)
    out = tl.where((n == N)[None, :], tl.sum(squares, 1)[:, None], out)
    tl.store(partial_ptr + (row[:, None] * num_splits + split) * WIDTH + n[None, :], out, mask=alive[:, None] & (n <= N)[None, :])


@triton.jit
def _mix(
    h_ptr, partial_ptr, base_ptr, scale_ptr, norm_ptr, x_ptr, token, dim, num_splits, norm_eps, hc_eps,
    N: tl.constexpr, WIDTH: tl.constexpr, NORM: tl.constexpr, SPLITS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    token = token.to(tl.int64)
    j = tl.arange(0, 4)
    channel = tl.arange(0, BD)
    kept = channel < dim
    streams = tl.load(h_ptr + (token * 4 + j[:, None]) * dim + channel[None, :], mask=kept[None, :], other=0.0)
    split = tl.arange(0, SPLITS)
    real = split < num_splits
    at = partial_ptr + (token * num_splits + split) * WIDTH
    sums = tl.sum(tl.load(at[:, None] + j[None, :], mask=real[:, None], other=0.0), 0)
    square = tl.sum(tl.load(at + N, mask=real, other=0.0), 0) / (4 * dim)
    gate = tl.sigmoid(sums * tl.rsqrt(square + norm_eps) * tl.load(scale_ptr) + tl.load(base_ptr + j)) + hc_eps
    x = tl.sum(streams.to(tl.float32) * gate[:, None], 0).to(streams.dtype)
    if NORM:
        wide = x.to(tl.float32)
        weight = tl.load(norm_ptr + channel, mask=kept, other=0.0).to(tl.float32)
        x = (wide * tl.rsqrt(tl.sum(wide * wide, 0) / dim + norm_eps) * weight).to(streams.dtype)
    tl.store(x_ptr + token * dim + channel, x, mask=kept)


@triton.jit
def _balance(
    partial_ptr, base_ptr, scale_ptr, post_ptr, comb_ptr, block, tokens, dim, num_splits, norm_eps, hc_eps, iterations,
    N: tl.constexpr, WIDTH: tl.constexpr, SPLITS: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    token = (block * BT + tl.arange(0, BT)).to(tl.int64)
    alive = token < tokens
    split = tl.arange(0, SPLITS)
    at = partial_ptr + (token[:, None] * num_splits + split[None, :]) * WIDTH
    real = alive[:, None] & (split < num_splits)[None, :]
    k = tl.arange(0, 4)
    jk = tl.arange(0, 16)
    rho = tl.rsqrt(tl.sum(tl.load(at + N, mask=real, other=0.0), 1) / (4 * dim) + norm_eps)[:, None]
    post = tl.sum(tl.load(at[:, :, None] + 4 + k[None, None, :], mask=real[:, :, None], other=0.0), 1) * rho
    comb = tl.sum(tl.load(at[:, :, None] + 8 + jk[None, None, :], mask=real[:, :, None], other=0.0), 1) * rho
    post = 2 * tl.sigmoid(post * tl.load(scale_ptr + 1) + tl.load(base_ptr + 4 + k)[None, :])
    comb = tl.reshape(comb * tl.load(scale_ptr + 2) + tl.load(base_ptr + 8 + jk)[None, :], [BT, 4, 4])
    comb = tl.exp(comb - tl.max(comb, 2)[:, :, None])
    comb = comb * (1.0 / tl.sum(comb, 2))[:, :, None] + hc_eps
    comb = comb * (1.0 / (tl.sum(comb, 1) + hc_eps))[:, None, :]
    for _ in range(iterations - 1):
        comb = comb * (1.0 / (tl.sum(comb, 2) + hc_eps))[:, :, None]
        comb = comb * (1.0 / (tl.sum(comb, 1) + hc_eps))[:, None, :]
    tl.store(post_ptr + token[:, None] * 4 + k[None, :], post, mask=alive[:, None])
    tl.store(comb_ptr + token[:, None] * 16 + jk[None, :], tl.reshape(comb, [BT, 16]), mask=alive[:, None])


@triton.jit
def project_kernel(
    h_ptr, y_ptr, post_ptr, comb_ptr, out_ptr, fn_ptr, partial_ptr, tokens, dim, num_splits, split_channels,
    N: tl.constexpr, PADDED_ROWS: tl.constexpr, POST: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    _project(
        h_ptr, y_ptr, post_ptr, comb_ptr, out_ptr, fn_ptr, partial_ptr, tokens, dim, tl.program_id(0), tl.program_id(1),
        num_splits, split_channels, N, PADDED_ROWS, POST, BT, BC,
    )  # fmt: skip


@triton.jit
def finish_kernel(
    h_ptr, partial_ptr, base_ptr, scale_ptr, norm_ptr, x_ptr, post_ptr, comb_ptr, tokens, dim, num_splits, balance_blocks,
    norm_eps, hc_eps, iterations,
    N: tl.constexpr, WIDTH: tl.constexpr, NORM: tl.constexpr, SPLITS: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    if program < balance_blocks:
        _balance(
            partial_ptr, base_ptr, scale_ptr, post_ptr, comb_ptr, program, tokens, dim, num_splits, norm_eps, hc_eps, iterations,
            N, WIDTH, SPLITS, BT,
        )  # fmt: skip
    else:  # the last tokens first: of what `project` read or wrote, those are still in L2
        _mix(
            h_ptr, partial_ptr, base_ptr, scale_ptr, norm_ptr, x_ptr, tokens - 1 - (program - balance_blocks), dim, num_splits,
            norm_eps, hc_eps, N, WIDTH, NORM, SPLITS, BD,
        )  # fmt: skip


@triton.jit
def one_launch_kernel(
    h_ptr, y_ptr, in_post_ptr, in_comb_ptr, out_ptr, fn_ptr, partial_ptr, base_ptr, scale_ptr, norm_ptr, x_ptr, post_ptr, comb_ptr,
    counter_ptr, tokens, dim, num_blocks, num_splits, split_channels, norm_eps, hc_eps, iterations,
    N: tl.constexpr, PADDED_ROWS: tl.constexpr, POST: tl.constexpr, NORM: tl.constexpr, SPLITS: tl.constexpr, BT: tl.constexpr,
    BC: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    if program < num_blocks * num_splits:
        _project(
            h_ptr, y_ptr, in_post_ptr, in_comb_ptr, out_ptr, fn_ptr, partial_ptr, tokens, dim, program // num_splits,
            program % num_splits, num_splits, split_channels, N, PADDED_ROWS, POST, BT, BC,
        )  # fmt: skip
    # Barrier of the grid. Each launch adds as many as it has programs to a counter of its own grid size, so a launch's end is known
    # from any value seen in it, and nothing has to be reset.
    tl.debug_barrier()
    programs = tl.num_programs(0)
    seen = tl.atomic_add(counter_ptr + programs, 1, sem="acq_rel")
    if program < 2 * tokens:
        end = (seen // programs + 1) * programs
        while tl.atomic_add(counter_ptr + programs, 0, sem="acquire") < end:
            pass
        tl.debug_barrier()
        if program < tokens:
            source = out_ptr if POST else h_ptr
            _mix(
                source, partial_ptr, base_ptr, scale_ptr, norm_ptr, x_ptr, program, dim, num_splits, norm_eps, hc_eps,
                N, PADDED_ROWS // 2, NORM, SPLITS, BD,
            )  # fmt: skip
        else:
            _balance(
                partial_ptr, base_ptr, scale_ptr, post_ptr, comb_ptr, program - tokens, tokens, dim, num_splits, norm_eps, hc_eps,
                iterations, N, PADDED_ROWS // 2, SPLITS, 1,
            )  # fmt: skip


def pack(fn: torch.Tensor) -> torch.Tensor:
    """float [N, M d] -> bfloat16 [2 N, M d]: row 2 n is fn[n] rounded, row 2 n + 1 what that leaves, rounded."""
    wide = fn.float()
    high = wide.to(torch.bfloat16)
    return torch.stack((high, (wide - high.float()).to(torch.bfloat16)), dim=1).flatten(0, 1).contiguous()


@dataclass(frozen=True, slots=True)
class Cut:
    """How the tokens and channels of `project` are cut into programs, and the widths of the rest."""

    block: int
    """Tokens of a program of `project`."""
    channels: int
    """Of each stream, per step of its loop."""
    split_channels: int
    """Of each stream, per program."""
    num_splits: int
    one_launch: bool
    num_warps: int
    """Of `project`; of all where one launch does all."""
    finish_warps: int

    def num_blocks(self, tokens: int) -> int:
        return -(-tokens // self.block)


def cut(tokens: int, dim: int, resident: bool = True) -> Cut:
    """Few tokens: thin slices, so that one token's work, the reading of fn, is spread over the whole chip. `resident`: programs run
    at the same time, so that they can wait for each other (interpreted ones do not)."""
    one_launch = tokens <= FUSED_TOKENS and resident
    block = 16 if tokens <= 16 else 32 if tokens <= 32 else 64
    channels = 32 if tokens <= FUSED_TOKENS else 64
    splits = max(1, 512 // max(1, -(-tokens // block)))
    per_split = max(channels, -(-dim // splits // channels) * channels)
    return Cut(block, channels, per_split, -(-dim // per_split), one_launch, 4, 8)


@functools.cache
def _counters(device: torch.device) -> torch.Tensor:
    """One barrier counter for each grid size. Launches that share it must not overlap: one stream a device runs the model."""
    return torch.zeros(4096, dtype=torch.int64, device=device)


def launch(
    h: torch.Tensor,
    after: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None,
    fn: torch.Tensor,
    base: torch.Tensor,
    scale: torch.Tensor,
    norm_weight: torch.Tensor | None,
    eps: tuple[float, float],
    iterations: int,
    cut: Cut,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`after`: (y, post, comb) of the sublayer before. `eps`: of the norm, of hc. `iterations` 0: no post and comb (hc_head).

    Returns (streams: new ones if `after`, else h; x; post; comb)."""
    tokens, mult, dim = h.shape
    assert mult == STREAMS and h.is_contiguous() and dim % 16 == 0 and h.dtype in (torch.bfloat16, torch.float32), f"{h.shape} {h.dtype}"
    num, rows = len(fn) // 2, max(16, triton.next_power_of_2(len(fn)))
    assert fn.shape[1] == mult * dim and fn.dtype == torch.bfloat16 and fn.is_contiguous(), f"{fn.shape} {fn.dtype}: not packed?"
    x = h.new_empty(tokens, dim)
    post = h.new_empty(tokens, mult, dtype=torch.float32)
    comb = h.new_empty(tokens, mult, mult, dtype=torch.float32)
    streams = h if after is None else torch.empty_like(h)
    if not tokens:
        return streams, x, post, comb
    y, in_post, in_comb = after or (h, post, comb)
    assert y.is_contiguous() and in_post.is_contiguous() and in_comb.is_contiguous()
    partial = h.new_empty(tokens, cut.num_splits, rows // 2, dtype=torch.float32)
    blocks, norm = cut.num_blocks(tokens), h if norm_weight is None else norm_weight
    splits = {"SPLITS": triton.next_power_of_2(cut.num_splits), "BD": triton.next_power_of_2(dim), "NORM": norm_weight is not None}
    shared = {"N": num, "PADDED_ROWS": rows, "POST": after is not None, "BT": cut.block, "BC": cut.channels}
    if cut.one_launch and iterations:
        one_launch_kernel[(max(blocks * cut.num_splits, 2 * tokens),)](
            h, y, in_post, in_comb, streams, fn, partial, base, scale, norm, x, post, comb, _counters(h.device), tokens, dim, blocks,
            cut.num_splits, cut.split_channels, *eps, iterations, **shared, **splits, num_warps=cut.num_warps,
            launch_cooperative_grid=True,
        )  # fmt: skip
        return streams, x, post, comb
    project_kernel[(blocks, cut.num_splits)](
        h, y, in_post, in_comb, streams, fn, partial, tokens, dim, cut.num_splits, cut.split_channels, **shared, num_warps=cut.num_warps
    )
    balance_block = 1 if tokens <= FUSED_TOKENS or not iterations else 16 if tokens <= 1024 else 64
    balance_blocks = -(-tokens // balance_block) if iterations else 0
    finish_kernel[(tokens + balance_blocks,)](
        streams, partial, base, scale, norm, x, post, comb, tokens, dim, cut.num_splits, balance_blocks, *eps, iterations,
        N=num, WIDTH=rows // 2, **splits, BT=balance_block, num_warps=cut.finish_warps,
    )  # fmt: skip
    return streams, x, post, comb


def run(
    h: torch.Tensor,
    fn: torch.Tensor,
    base: torch.Tensor,
    scale: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_eps: float,
    hc_eps: float,
    sinkhorn_iters: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As the reference, with packed fn and contiguous h."""
    tokens, _, dim = h.shape
    return launch(h, None, fn, base, scale, norm_weight, (norm_eps, hc_eps), sinkhorn_iters, cut(tokens, dim, h.is_cuda))[1:]


def _aot(dtype: str, post: bool, num: int, dim: int, tokens: int) -> list[tuple[Any, ...]]:
    plan = cut(tokens, dim)
    rows = max(16, triton.next_power_of_2(2 * num))
    streams = dict.fromkeys(("h_ptr", "y_ptr", "out_ptr", "x_ptr"), dtype)
    floats = dict.fromkeys(("post_ptr", "comb_ptr", "in_post_ptr", "in_comb_ptr", "partial_ptr", "base_ptr", "scale_ptr"), "*fp32")
    integers = dict.fromkeys(("tokens", "num_blocks", "num_splits", "balance_blocks", "iterations"), "i32")
    types = streams | floats | integers | {"dim": "i32:16", "split_channels": "i32:16", "norm_eps": "fp32", "hc_eps": "fp32"}
    types |= {"fn_ptr": "*bf16", "norm_ptr": "*bf16", "counter_ptr": "*i64"}
    constants = {"N": num, "PADDED_ROWS": rows, "WIDTH": rows // 2, "POST": post, "NORM": num != STREAMS, "BT": plan.block}
    constants |= {"BC": plan.channels, "BD": triton.next_power_of_2(dim), "SPLITS": triton.next_power_of_2(plan.num_splits)}

    def entry(kernel: triton.JITFunction, warps: int, **changed: int):
        used = {name: value for name, value in (constants | changed).items() if name in kernel.arg_names}
        return kernel, {name: types[name] for name in kernel.arg_names if name not in used}, used, {"num_warps": warps}

    if plan.one_launch and num != STREAMS:
        return [entry(one_launch_kernel, plan.num_warps)]
    return [entry(project_kernel, plan.num_warps), entry(finish_kernel, plan.finish_warps, BT=64 if num != STREAMS else 1)]


AOT = [
    *_aot("*bf16", False, 24, 4096, 1),
    *_aot("*bf16", True, 24, 7168, 64),
    *_aot("*fp32", True, 24, 256, 1),
    *_aot("*bf16", False, 24, 4096, 8192),
    *_aot("*bf16", True, 24, 7168, 8192),
    *_aot("*bf16", False, 4, 4096, 128),
]

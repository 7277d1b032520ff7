"""Routed experts of few rows, or of more on Hopper: the launches, on a batch of rows and the ids of their experts, or in rooms.

Blocks of `block_m` slots belong to one expert each. There is room for as many as the routing can need at most, and grids depend on
shapes only. On a batch a block has programs of its own, which end at once if it is not needed. In rooms nearly none is, in a large group:
there are programs for twice the blocks that the usual rows need at most, and they go on as long as there are blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from engine.model.quantized import FP8_BLOCK, QuantizedRows
from engine.ops.moe_experts import Rooms, hopper
from engine.ops.moe_experts.hopper import Hopper
from engine.ops.moe_experts.tiles import MOST_SPLIT_BLOCKS, PackedExperts
from engine.ops.moe_experts.triton_few import moe_hidden_kernel, moe_out_kernel
from engine.ops.moe_experts.triton_route import MOST_BLOCKS, MOST_EXPERTS, moe_rooms_kernel, moe_route_kernel

CHUNK = 4096
"""Pairs that a listing program looks at in one go."""


@dataclass(frozen=True, slots=True)
class Few:
    """Tiles of triton_few.py's kernels, chosen by rows an expert has on average (tests/benchmarks/results)."""

    block_m: int
    group_blocks: int
    stages: int
    hidden_splits: int = 1
    out_splits: int = 1
    out_tiles: int = 1
    """Of 128 channels, of a program of `out`: 2 where K is not split, of experts at 4 bits with an even number of them."""
    warps: int = 4
    registers: int | None = None
    """The most a thread takes."""


@dataclass(frozen=True, slots=True)
class _Blocks:
    """Which rows are whose; undefined until a kernel has listed them."""

    pairs: torch.Tensor
    """int32 [num_blocks * block_m]: token * top_k + place, or in rooms expert * room + row; -1 behind a block's last."""
    expert: torch.Tensor
    """int32 [num_blocks]; -1 behind the last block, of those that have programs of their own."""
    listed: torch.Tensor
    """int32 [1]: how many there are; undefined on a batch."""

    @staticmethod
    def of(rows: int, experts: PackedExperts, block_m: int) -> _Blocks:
        """Room for as many as so many rows need at most."""
        most = most_blocks(rows, experts, block_m)
        assert most < MOST_BLOCKS.value and experts.num_experts <= MOST_EXPERTS.value, f"{most} blocks of {experts.num_experts} experts"
        return _Blocks(*(torch.empty(size, dtype=torch.int32, device=experts.taken.device) for size in (most * block_m, most, 1)))


def most_blocks(rows: int, experts: PackedExperts, block_m: int) -> int:
    """That so many rows can need."""
    return min(rows, experts.num_experts) + rows // block_m


def run_batch(
    x: torch.Tensor | QuantizedRows, ids: torch.Tensor, weights: torch.Tensor, experts: PackedExperts, limit: float, config: Few | Hopper
) -> torch.Tensor:
    """x: contiguous, if a tensor. Returns bf16 [pairs, d]; rows of pairs that are not here are undefined."""
    tokens, pairs, device, w13 = len(ids), ids.numel(), ids.device, experts.w13
    groups, blocks = min(8, triton.next_power_of_2(w13.k_tiles)), _Blocks.of(pairs, experts, config.block_m)
    if isinstance(x, QuantizedRows):
        assert x.codes.shape == (tokens, w13.k_tiles * FP8_BLOCK), f"{x.codes.shape}"
        codes, scales, quantizers = x.codes.contiguous(), x.scale.contiguous(), 0
    else:
        codes = torch.empty(tokens, w13.k_tiles * FP8_BLOCK, dtype=torch.float8_e4m3fn, device=device)
        scales = torch.empty(tokens, w13.k_tiles, dtype=torch.float32, device=device)
        quantizers = tokens * triton.cdiv(w13.k_tiles, groups)
    moe_route_kernel[(experts.num_experts + quantizers,)](
        ids,
        x if isinstance(x, torch.Tensor) else codes,
        codes,
        scales,
        blocks.pairs,
        blocks.expert,
        experts.taken,
        pairs,
        experts.num_experts,
        len(blocks.expert),
        experts.width,
        w13.k_tiles * FP8_BLOCK,
        BLOCK_M=config.block_m,
        CHUNK=min(CHUNK, max(32, triton.next_power_of_2(pairs))),
        GROUPS=groups,
        num_warps=4,
    )
    out = torch.empty(pairs, experts.width, dtype=torch.bfloat16, device=device)
    _multiply(codes, scales, (w13.k_tiles, 1, 0), blocks, len(blocks.expert), ids.shape[1], weights, out, experts, limit, config)
    return out


def run_rooms(x: Rooms, experts: PackedExperts, limit: float, config: Few | Hopper) -> torch.Tensor:
    """x.out, written: three launches, and rows are read and left where they lie."""
    num_experts, room, width = x.codes.shape
    assert num_experts == experts.num_experts and width == experts.width == experts.w13.k_tiles * FP8_BLOCK, f"{x.codes.shape}"
    assert x.codes.is_contiguous() and x.counts.is_contiguous(), f"{x.codes.stride()=} {x.counts.stride()=}"
    assert x.out.shape == x.codes.shape and x.out.dtype == torch.bfloat16 and x.out.stride(2) == 1, f"{x.out.shape} {x.out.stride()}"
    assert x.out.stride(0) == room * x.out.stride(1), f"rows of experts are not at equal distances: {x.out.stride()}"
    if not x.most:
        return x.out
    assert 0 < x.usual <= x.most, f"{x.usual=} {x.most=}"
    blocks = _Blocks.of(x.most, experts, config.block_m)
    shares_k = isinstance(config, Few) and max(config.hidden_splits, config.out_splits) > 1  # then a block has programs of its own
    programs = len(blocks.expert) if shares_k else most_blocks(min(x.most, 2 * x.usual), experts, config.block_m)
    moe_rooms_kernel[(num_experts,)](
        x.counts,
        blocks.pairs,
        blocks.expert,
        blocks.listed,
        experts.taken,
        room,
        num_experts,
        programs,
        BLOCK_M=config.block_m,
        CHUNK=128,
        num_warps=4,
    )
    of_expert, of_row, of_group = x.scale.stride()
    strides = of_row, of_group, of_expert - room * of_row
    _multiply(x.codes, x.scale, strides, blocks, programs, 1, None, x.out, experts, limit, config)
    return x.out


def _multiply(
    codes: torch.Tensor,
    scales: torch.Tensor,
    scale_strides: tuple[int, int, int],
    blocks: _Blocks,
    programs: int,
    top_k: int,
    weights: torch.Tensor | None,
    out: torch.Tensor,
    experts: PackedExperts,
    limit: float,
    config: Few | Hopper,
) -> None:
    """Both products, into the pairs' rows of `out`, [..., d]. scale_strides: of a row, of a group, and what is between two experts beside
    the rows between them. programs: how many blocks have programs of their own."""
    device, w13, w2 = codes.device, experts.w13, experts.w2
    hidden = torch.empty(len(blocks.pairs), w13.num_tiles * FP8_BLOCK, dtype=torch.float8_e4m3fn, device=device)
    hidden_scales = torch.empty(len(blocks.pairs), w13.num_tiles, dtype=torch.float32, device=device)
    if isinstance(config, Hopper):
        listed = blocks.pairs, blocks.expert, blocks.listed
        hopper.multiply(codes, scales, scale_strides, listed, top_k, weights, hidden, hidden_scales, out, experts, limit, config.block_m)
        return
    splits = config.hidden_splits, config.out_splits
    assert config.out_splits == 1 or config.out_tiles == 1, f"{config} shares K between programs of several tiles"
    assert max(splits) == 1 or programs <= MOST_SPLIT_BLOCKS, f"{programs} blocks cannot share K"
    parts = [count * part for count, part in zip(splits, (2 * w13.num_tiles, w2.num_tiles), strict=True) if count > 1]
    scratch = torch.empty(max(parts, default=0) * programs * FP8_BLOCK * config.block_m, dtype=torch.float32, device=device)
    tiles = {"BLOCK_M": config.block_m, "GROUP_BLOCKS": config.group_blocks, "NUM_STAGES": config.stages, "FP4": experts.fp4}
    tiles |= {"LOOPS": programs < len(blocks.expert)}
    options = {"num_warps": config.warps, "maxnreg": config.registers}
    moe_hidden_kernel[(programs * w13.num_tiles, splits[0])](
        codes,
        scales,
        w13.codes,
        w13.scale,
        blocks.pairs,
        blocks.expert,
        blocks.listed,
        scales if weights is None else weights,
        hidden,
        hidden_scales,
        scratch,
        experts.arrived,
        programs,
        w13.num_tiles,
        w13.k_tiles,
        top_k,
        *scale_strides,
        limit,
        **tiles,
        SPLITS=splits[0],
        WEIGHTED=weights is not None,
        **options,
    )
    out_tiles = config.out_tiles if experts.fp4 and w2.num_tiles % config.out_tiles == 0 else 1
    moe_out_kernel[(programs * (w2.num_tiles // out_tiles), splits[1])](
        hidden,
        hidden_scales,
        w2.codes,
        w2.scale,
        blocks.pairs,
        blocks.expert,
        blocks.listed,
        out,
        scratch,
        experts.arrived,
        programs,
        w2.num_tiles,
        w2.k_tiles,
        experts.width,
        out.stride(-2),
        **tiles,
        TILES=out_tiles,
        SPLITS=splits[1],
        **options,
    )

"""Routed experts, whatever the routing: no host synchronisation, a grid that depends on shapes only, no atomics on values.

Few rows an expert, or more on Hopper (few.py): four launches, experts read at 4 bits.
1 route    lists each expert's (token, place) pairs in blocks, and quantises x to FP8
2 hidden   w1 and w3, clamped SwiGLU, routing weight, FP8 again; one block of pairs and 128 channels a program
3 out      w2, rounded to bf16, one row a pair
4 sum      a token's rows in fp32, in order, unless they are wanted as they are
In rooms (`Rooms`) `hidden` and `out` work where the rows lie; 1 lists them by their counts, and 4 is not needed.

Many rows (triton_many.py): MXFP4 is widened to FP8 in a workspace of a byte a weight, x is gathered by expert, and a grouped FP8
product follows: ours, or that of a library with the same tiles.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton

from core.errors import ConfigError
from engine.model.quantized import FP8_BLOCK, QuantizedRows, Weight
from engine.ops.moe_experts import Rooms, hopper
from engine.ops.moe_experts.few import CHUNK, Few, most_blocks, run_batch, run_rooms
from engine.ops.moe_experts.hopper import Hopper
from engine.ops.moe_experts.tiles import PackedExperts, Tiles, pack_experts
from engine.ops.moe_experts.triton_many import moe_act_kernel, moe_gather_kernel, moe_many_kernel, moe_widen_kernel
from engine.ops.moe_experts.triton_route import moe_count_kernel, moe_list_kernel, moe_sum_kernel

PARTS = 8
"""Of many pairs, which as many programs list side by side for each expert."""
ROWS = 4
"""Slots of a program that moves rows: in a group half of them or more belong to nobody, and a program each to find that out takes time."""


@dataclass(frozen=True, slots=True)
class Many:
    """Tiles of the kernels for many rows."""

    block_m: int = 64
    group_blocks: int = 8
    stages: int = 4
    warps: int = 4


MANY_ROWS = 224
"""Rows an expert from which widening pays, where Hopper's own kernels do not serve."""
FEW_ROWS, FEW_ROWS_IN_ROOMS, MORE_ROWS, MANY_HOPPER_ROWS = 16, 14, 32, 66
"""Rows an expert, on average, up to which blocks are of 16, of 32, and on Hopper of 64; above of 32 or 128."""

BLOCKS_OF_16, BLOCKS_OF_32 = Few(16, 1, 3, out_tiles=2, registers=128), Few(32, 1, 3, out_tiles=2)


def choose(num_pairs: int, rows: float, few_rows: int, experts: PackedExperts) -> Few | Hopper | Many:
    """rows: of an expert, on average; few_rows: up to which blocks are of 16."""
    if rows <= few_rows:
        return _choose_few(num_pairs, experts)
    if rows > MORE_ROWS and hopper.serves(experts):
        return Hopper(64 if rows <= MANY_HOPPER_ROWS else 128)
    return Many() if rows >= MANY_ROWS and experts.widens else BLOCKS_OF_32


def _choose_few(num_pairs: int, experts: PackedExperts) -> Few:
    blocks = most_blocks(num_pairs, experts, 16)  # in a group of ranks half of them or fewer are here
    if blocks > 32:
        return BLOCKS_OF_16
    return Few(16, 1, 3, 4, 2) if blocks <= 16 else Few(16, 1, 3, 2, 2)  # too few blocks for a GPU: they share K


@dataclass(frozen=True, slots=True)
class Slots:
    """Rows gathered by expert: blocks of block_m slots each belong to one expert."""

    pairs: torch.Tensor
    """int32 [num_slots]: token * top_k + place; -1 behind a block's last."""
    block_expert: torch.Tensor
    """int32 [num_slots / block_m], -1 behind the last block."""
    ends: torch.Tensor
    """int32 [E]: the slot behind each expert's last pair; its first is that of a block, the one behind the expert's before."""
    slots: torch.Tensor
    """int32 [T * top_k]: a pair's slot; undefined for experts that are not here."""
    block_m: int


Product = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, Slots, Many], torch.Tensor]
"""(codes e4m3 [num_slots, K], scales fp32 [num_slots, K / 128] with contiguous columns, weights e4m3 [E, N, K], their scales fp32
[E, N / 128, K / 128], ...) -> bf16 [num_slots, N]; rows of slots without a pair are undefined."""


def run(
    x: torch.Tensor | QuantizedRows | Rooms,
    ids: torch.Tensor | None,
    weights: torch.Tensor | None,
    experts: PackedExperts,
    limit: float,
    sum_dtype: torch.dtype | None = torch.float32,
    among: int | None = None,
) -> torch.Tensor:
    """As the reference, x in bf16, or quantised from it; sum_dtype float32, bfloat16 or None."""
    if isinstance(x, Rooms):
        config = choose(x.most, x.usual / experts.num_experts, FEW_ROWS_IN_ROOMS, experts)
        return run_rooms(x, experts, limit, BLOCKS_OF_32 if isinstance(config, Many) else config)
    assert ids is not None and weights is not None, "rows that lie in no rooms, without ids or weights"
    config = choose(ids.numel(), ids.numel() / (among or experts.num_experts), FEW_ROWS, experts)
    return run_with(x, ids, weights, experts, limit, sum_dtype, config)


def run_with(
    x: torch.Tensor | QuantizedRows,
    ids: torch.Tensor,
    weights: torch.Tensor,
    experts: PackedExperts,
    limit: float,
    sum_dtype: torch.dtype | None,
    config: Few | Hopper | Many,
    product: Product | None = None,
) -> torch.Tensor:
    """`product` in place of our own for many rows."""
    tokens, top_k = ids.shape
    if not ids.numel():
        return torch.empty(
            *((tokens, top_k) if sum_dtype is None else (tokens,)), experts.width, dtype=sum_dtype or x.dtype, device=ids.device
        )
    x = x.contiguous() if isinstance(x, torch.Tensor) else x
    ids, weights = ids.contiguous(), weights.contiguous()
    if isinstance(config, Many):
        rows, slots = _many(x, ids, weights, experts, limit, config, product or multiply)
    else:
        rows, slots = run_batch(x, ids, weights, experts, limit, config), ids
    if sum_dtype is None:  # sums of one row each, where rows lie in slots
        if not isinstance(config, Many):
            return rows.unflatten(0, (tokens, top_k))
        ids, tokens, top_k = ids.view(-1, 1), tokens * top_k, 1
    out = torch.empty(tokens, experts.width, dtype=sum_dtype or rows.dtype, device=ids.device)
    channels = min(1024, triton.next_power_of_2(experts.width))
    moe_sum_kernel[(tokens, triton.cdiv(experts.width, channels))](
        rows,
        ids,
        slots,
        out,
        experts.num_experts,
        experts.width,
        rows.shape[1],
        TOP_K=top_k,
        CHANNELS=channels,
        SLOTS=isinstance(config, Many),
        num_warps=4,
    )
    return out if sum_dtype is not None else out.unflatten(0, (-1, weights.shape[1]))


def _many(
    x: torch.Tensor | QuantizedRows,
    ids: torch.Tensor,
    weights: torch.Tensor,
    experts: PackedExperts,
    limit: float,
    config: Many,
    product: Product,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(bf16 [num_slots, d'], each pair's slot)."""
    device, w13, block_m = ids.device, experts.w13, config.block_m
    slots = _list(ids, experts.num_experts, block_m)
    num_slots = len(slots.pairs)

    def rows(k_tiles: int) -> tuple[torch.Tensor, torch.Tensor]:
        codes = torch.empty(num_slots, k_tiles * FP8_BLOCK, dtype=torch.float8_e4m3fn, device=device)
        return codes, torch.empty(k_tiles, num_slots, dtype=torch.float32, device=device).T

    codes, scales = rows(w13.k_tiles)
    groups = min(32, triton.next_power_of_2(w13.k_tiles))
    if isinstance(x, QuantizedRows):
        assert x.codes.shape[1] == w13.k_tiles * FP8_BLOCK and x.codes.stride(1) == x.scale.stride(1) == 1, f"{x.codes.shape}"
        rows_in: tuple[object, ...] = x.codes, x.scale, x.codes.stride(0), x.scale.stride(0)
    else:
        rows_in = x, x, experts.width, 0
    moe_gather_kernel[num_slots // ROWS, triton.cdiv(w13.k_tiles, groups)](
        *rows_in,
        slots.pairs,
        slots.block_expert,
        codes,
        scales,
        num_slots,
        ids.shape[1],
        experts.width,
        w13.k_tiles,
        QUANTIZED=isinstance(x, QuantizedRows),
        BLOCK_M=block_m,
        ROWS=ROWS,
        GROUPS=groups,
        num_warps=8,
    )
    gate_up = product(codes, scales, *_widened(w13, experts.fp4), slots, config)
    codes, scales = rows(w13.num_tiles)
    groups = min(16, triton.next_power_of_2(w13.num_tiles))
    moe_act_kernel[num_slots // ROWS, triton.cdiv(w13.num_tiles, groups)](
        gate_up,
        slots.pairs,
        slots.block_expert,
        weights,
        codes,
        scales,
        num_slots,
        w13.num_tiles,
        limit,
        BLOCK_M=block_m,
        ROWS=ROWS,
        GROUPS=groups,
        num_warps=8,
    )
    return product(codes, scales, *_widened(experts.w2, experts.fp4), slots, config), slots.slots


def _list(ids: torch.Tensor, num_experts: int, block_m: int) -> Slots:
    pairs, device = ids.numel(), ids.device
    max_blocks = min(pairs, num_experts) + pairs // block_m
    part_pairs = triton.cdiv(pairs, PARTS * 128) * 128
    counts = torch.empty(num_experts, PARTS, dtype=torch.int32, device=device)
    sizes = max_blocks * block_m, max_blocks, num_experts, pairs
    slots = Slots(*(torch.empty(size, dtype=torch.int32, device=device) for size in sizes), block_m)
    moe_count_kernel[(num_experts, PARTS)](ids, counts, pairs, part_pairs, CHUNK=CHUNK, num_warps=8)
    moe_list_kernel[(num_experts, PARTS)](
        ids,
        counts,
        slots.pairs,
        slots.block_expert,
        slots.slots,
        slots.ends,
        pairs,
        part_pairs,
        num_experts,
        max_blocks,
        PADDED_E=triton.next_power_of_2(num_experts),
        PARTS=PARTS,
        BLOCK_M=block_m,
        CHUNK=CHUNK,
        num_warps=8,
    )
    return slots


def _widened(weight: Tiles, fp4: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3 [E, M * N, K] and fp32 [E, M * N / 128, K / 128]."""
    if not fp4:
        return weight.codes, weight.scale
    experts, height, device = len(weight.codes), weight.places * weight.num_tiles, weight.codes.device
    wide = torch.empty(experts, height * FP8_BLOCK, weight.k_tiles * FP8_BLOCK, dtype=torch.float8_e4m3fn, device=device)
    scale = torch.empty(experts, height, weight.k_tiles, dtype=torch.float32, device=device)
    grid = (experts * height * weight.k_tiles,)
    moe_widen_kernel[grid](weight.codes, weight.scale, wide, scale, weight.num_tiles, weight.k_tiles, PLACES=weight.places, num_warps=4)
    return wide, scale


def multiply(
    codes: torch.Tensor, scales: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, slots: Slots, config: Many
) -> torch.Tensor:
    """Our own `Product`."""
    _, num_tiles, k_tiles = weight_scale.shape
    out = torch.empty(len(codes), num_tiles * FP8_BLOCK, dtype=torch.bfloat16, device=codes.device)
    moe_many_kernel[(len(slots.block_expert) * num_tiles,)](
        codes,
        scales,
        weight,
        weight_scale,
        slots.block_expert,
        out,
        len(codes),
        num_tiles,
        k_tiles,
        BLOCK_M=config.block_m,
        GROUP_BLOCKS=config.group_blocks,
        NUM_STAGES=config.stages,
        num_warps=config.warps,
    )
    return out


def pack(w1: list[Weight], w2: list[Weight], w3: list[Weight], quantize_activations: bool) -> PackedExperts:
    """As the reference's; see `pack_experts`."""
    return pack_experts(w1, w2, w3, quantize_activations)


def widen(experts: PackedExperts) -> PackedExperts:
    """The same weights as FP8, in new memory. Raises ConfigError if they are not MXFP4, or not exact as FP8."""
    if experts.widening_bytes is None:
        raise ConfigError("engine.ops.moe_experts: these experts are not MXFP4 with group scales that FP8 holds; they cannot be widened")

    def wide(tiles: Tiles) -> Tiles:
        return Tiles(*_widened(tiles, fp4=True), tiles.num_tiles, tiles.k_tiles, tiles.places)

    return PackedExperts(wide(experts.w13), wide(experts.w2), False, experts.width, experts.counters, True)

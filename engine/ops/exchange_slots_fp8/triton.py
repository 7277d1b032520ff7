"""exchange_slots_fp8 in one launch, a program a token."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.model.quantized import FP8_BLOCK
from engine.ops.exchange_slots.triton import counted_slots
from engine.ops.triton_rounding import quantize

BLOCK = tl.constexpr(FP8_BLOCK)


@triton.jit
def exchange_slots_fp8_kernel(
    x_ptr, ids_ptr, positions_ptr, table_ptr, turns_ptr, load_ptr, codes_ptr, scale_ptr, slots_ptr, groups, copies,
    TOP_K: tl.constexpr, PADDED_K: tl.constexpr, PADDED_GROUPS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, PADDED_GROUPS)[:, None]
    channel = token * (groups * BLOCK) + group * BLOCK + tl.arange(0, BLOCK)[None, :]
    codes, scale = quantize(tl.load(x_ptr + channel, mask=group < groups, other=0.0).to(tl.float32), 1)
    tl.store(codes_ptr + channel, codes, mask=group < groups)
    tl.store(scale_ptr + token * groups + group, scale, mask=group < groups)
    place = tl.arange(0, PADDED_K)
    slot = counted_slots(token, place, ids_ptr, positions_ptr, table_ptr, turns_ptr, load_ptr, copies, TOP_K)
    tl.store(slots_ptr + token * TOP_K + place, slot, mask=place < TOP_K)


def run(
    x: torch.Tensor, ids: torch.Tensor, positions: torch.Tensor, table: torch.Tensor, turns: torch.Tensor, load: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As the reference; all contiguous."""
    assert all(tensor.is_contiguous() for tensor in (x, ids, positions, table, turns, load)), f"{x.stride()=} {ids.stride()=}"
    (tokens, top_k), groups = ids.shape, x.shape[1] // FP8_BLOCK
    codes = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(tokens, groups, dtype=torch.float32, device=x.device)
    slots = torch.empty_like(ids)
    if tokens:
        exchange_slots_fp8_kernel[(tokens,)](
            x, ids, positions, table, turns, load, codes, scale, slots, groups, table.shape[1],
            TOP_K=top_k, PADDED_K=triton.next_power_of_2(top_k), PADDED_GROUPS=triton.next_power_of_2(groups), num_warps=4,
        )  # fmt: skip
    return codes, scale, slots


_LONGS = dict.fromkeys(("ids_ptr", "positions_ptr", "table_ptr", "turns_ptr", "load_ptr", "slots_ptr"), "*i64")
_POINTERS = {"x_ptr": "*bf16", "codes_ptr": "*fp8e4nv", "scale_ptr": "*fp32"}
AOT = [
    (
        exchange_slots_fp8_kernel,
        _LONGS | _POINTERS | {"groups": kind, "copies": "i32"},
        {"TOP_K": 6, "PADDED_K": 8, "PADDED_GROUPS": groups},
        {"num_warps": 4},
    )
    for groups, kind in ((32, "i32:16"), (64, "i32"))
]

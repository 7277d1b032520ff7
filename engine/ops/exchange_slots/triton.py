"""exchange_slots in one launch, a program a token; and what it does for a token, which other ops do, too."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def counted_slots(token, place, ids_ptr, positions_ptr, table_ptr, turns_ptr, load_ptr, copies, TOP_K: tl.constexpr, is_token=True):
    """int64, as `place`: the slots of a token's experts, the places below TOP_K, which are counted. -1 for a token without a position,
    and where there is none."""
    there = (place < TOP_K) & is_token
    expert = tl.load(ids_ptr + token * TOP_K + place, mask=there, other=0)
    turn = token % tl.load(turns_ptr + expert, mask=there, other=1)
    slot = tl.load(table_ptr + expert * copies + turn, mask=there, other=0)
    counts = there & (tl.load(positions_ptr + token, mask=is_token, other=-1) >= 0)
    tl.atomic_add(load_ptr + expert, tl.full(place.shape, 1, tl.int64), mask=counts, sem="relaxed")
    return tl.where(counts, slot, -1)


@triton.jit
def exchange_slots_kernel(
    ids_ptr, positions_ptr, table_ptr, turns_ptr, load_ptr, out_ptr, copies, TOP_K: tl.constexpr, PADDED_K: tl.constexpr
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, PADDED_K)
    slot = counted_slots(token, place, ids_ptr, positions_ptr, table_ptr, turns_ptr, load_ptr, copies, TOP_K)
    tl.store(out_ptr + token * TOP_K + place, slot, mask=place < TOP_K)


def run(ids: torch.Tensor, positions: torch.Tensor, table: torch.Tensor, turns: torch.Tensor, load: torch.Tensor) -> torch.Tensor:
    """As the reference; all contiguous."""
    assert all(tensor.is_contiguous() for tensor in (ids, positions, table, turns, load)), f"{ids.stride()=} {positions.stride()=}"
    out = torch.empty_like(ids)
    if len(ids):
        top_k = ids.shape[1]
        exchange_slots_kernel[(len(ids),)](
            ids, positions, table, turns, load, out, table.shape[1], TOP_K=top_k, PADDED_K=triton.next_power_of_2(top_k), num_warps=1
        )  # fmt: skip
    return out


AOT = [
    (
        exchange_slots_kernel,
        dict.fromkeys(("ids_ptr", "positions_ptr", "table_ptr", "turns_ptr", "load_ptr", "out_ptr"), "*i64") | {"copies": "i32"},
        {"TOP_K": 6, "PADDED_K": 8},
        {"num_warps": 1},
    )
]

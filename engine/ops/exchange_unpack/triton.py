"""exchange_unpack in one launch, a program a row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def exchange_unpack_kernel(
    rows_ptr, x_ptr, ids_ptr, weights_ptr, width, first_slot, num_slots,
    TOP_K: tl.constexpr, PADDED_K: tl.constexpr, PADDED_WIDTH: tl.constexpr,
):  # fmt: skip
    """x and the weights are 32-bit words, `width` of x in a row."""
    row = tl.program_id(0).to(tl.int64)
    rows_ptr += row * (width + 2 * TOP_K)
    word = tl.arange(0, PADDED_WIDTH)
    tl.store(x_ptr + row * width + word, tl.load(rows_ptr + word, mask=word < width), mask=word < width)
    place = tl.arange(0, PADDED_K)
    there = place < TOP_K
    slot = tl.load(rows_ptr + width + place, mask=there, other=-1)
    here = (slot >= first_slot) & (slot < first_slot + num_slots)
    tl.store(ids_ptr + row * TOP_K + place, tl.where(here, slot - first_slot, -1).to(tl.int64), mask=there)
    tl.store(weights_ptr + row * TOP_K + place, tl.load(rows_ptr + width + TOP_K + place, mask=there), mask=there)


def run(
    rows: torch.Tensor, top_k: int, rank: int, slots_per_rank: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As the reference; rows contiguous."""
    assert rows.is_contiguous() and rows.dtype == torch.int32, f"{rows.dtype} {rows.stride()}"
    number, width = len(rows), rows.shape[1] - 2 * top_k
    x = torch.empty(number, width, dtype=torch.int32, device=rows.device)
    ids = torch.empty(number, top_k, dtype=torch.int64, device=rows.device)
    weights = torch.empty(number, top_k, dtype=torch.float32, device=rows.device)
    if number:
        exchange_unpack_kernel[(number,)](
            rows, x, ids, weights.view(torch.int32), width, rank * slots_per_rank, slots_per_rank,
            TOP_K=top_k, PADDED_K=triton.next_power_of_2(top_k), PADDED_WIDTH=triton.next_power_of_2(width), num_warps=4,
        )  # fmt: skip
    return x.view(dtype), ids, weights


_TYPES = dict.fromkeys(("rows_ptr", "x_ptr", "weights_ptr"), "*i32") | {"ids_ptr": "*i64", "width": "i32:16"}
AOT = [
    (
        exchange_unpack_kernel,
        _TYPES | {"first_slot": "i32", "num_slots": "i32"},
        {"TOP_K": 6, "PADDED_K": 8, "PADDED_WIDTH": width},
        {"num_warps": 4},
    )
    for width in (2048, 4096)
]

"""exchange_unpack_fp8 in one launch, a program some labels."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.ops.exchange_unpack_fp8 import labels, values

BLOCK = 512


@triton.jit(do_not_specialize=["rows", "first_slot", "num_slots"])
def exchange_unpack_fp8_kernel(
    slots_ptr, ids_ptr, weights_ptr, rows, words, first_slot, num_slots, TOP_K: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """A row's slots, then the bits of its weights, `words` from one row to the next."""
    label = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = label < rows * TOP_K
    slots_ptr += label // TOP_K * words + label % TOP_K
    slot = tl.load(slots_ptr, mask=there, other=-1)
    here = (slot >= first_slot) & (slot < first_slot + num_slots)
    tl.store(ids_ptr + label, tl.where(here, slot - first_slot, -1).to(tl.int64), mask=there)
    tl.store(weights_ptr + label, tl.load(slots_ptr + TOP_K, mask=there, other=0), mask=there)


def run(
    rows: torch.Tensor, width: int, top_k: int, rank: int, slots_per_rank: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """As the reference; rows contiguous."""
    assert rows.is_contiguous() and rows.dtype == torch.int32, f"{rows.dtype} {rows.stride()}"
    ids = torch.empty(len(rows), top_k, dtype=torch.int64, device=rows.device)
    weights = torch.empty(len(rows), top_k, dtype=torch.float32, device=rows.device)
    if len(rows):
        slots = labels(rows, width, top_k)[0]
        exchange_unpack_fp8_kernel[(triton.cdiv(ids.numel(), BLOCK),)](
            slots, ids, weights.view(torch.int32), len(rows), rows.shape[1], rank * slots_per_rank, slots_per_rank,
            TOP_K=top_k, BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
    return *values(rows, width), ids, weights


_TYPES = {"slots_ptr": "*i32", "ids_ptr": "*i64", "weights_ptr": "*i32", "words": "i32:16"}
AOT = [
    (
        exchange_unpack_fp8_kernel,
        _TYPES | dict.fromkeys(("rows", "first_slot", "num_slots"), "i32"),
        {"TOP_K": 6, "BLOCK": BLOCK},
        {"num_warps": 4},
    )
]

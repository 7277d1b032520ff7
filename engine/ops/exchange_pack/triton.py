"""exchange_pack in one launch, a program a token."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.ops.exchange_slots.triton import counted_slots


@triton.jit
def exchange_pack_kernel(
    x_ptr, ids_ptr, weights_ptr, positions_ptr, table_ptr, turns_ptr, load_ptr, out_ptr, width, copies,
    TOP_K: tl.constexpr, PADDED_K: tl.constexpr, PADDED_WIDTH: tl.constexpr,
):  # fmt: skip
    """x and the weights are 32-bit words, `width` of x in a row."""
    token = tl.program_id(0).to(tl.int64)
    out_ptr += token * (width + 2 * TOP_K)
    word = tl.arange(0, PADDED_WIDTH)
    tl.store(out_ptr + word, tl.load(x_ptr + token * width + word, mask=word < width), mask=word < width)
    place = tl.arange(0, PADDED_K)
    there = place < TOP_K
    slot = counted_slots(token, place, ids_ptr, positions_ptr, table_ptr, turns_ptr, load_ptr, copies, TOP_K)
    tl.store(out_ptr + width + place, slot.to(tl.int32), mask=there)
    tl.store(out_ptr + width + TOP_K + place, tl.load(weights_ptr + token * TOP_K + place, mask=there), mask=there)


def run(
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    positions: torch.Tensor,
    table: torch.Tensor,
    turns: torch.Tensor,
    load: torch.Tensor,
) -> torch.Tensor:
    """As the reference; all contiguous."""
    assert all(tensor.is_contiguous() for tensor in (x, ids, weights, positions, table, turns, load)), f"{x.stride()=} {ids.stride()=}"
    words, (tokens, top_k) = x.view(torch.int32), ids.shape
    out = torch.empty(tokens, words.shape[1] + 2 * top_k, dtype=torch.int32, device=x.device)
    if tokens:
        exchange_pack_kernel[(tokens,)](
            words, ids, weights.view(torch.int32), positions, table, turns, load, out, words.shape[1], table.shape[1],
            TOP_K=top_k, PADDED_K=triton.next_power_of_2(top_k), PADDED_WIDTH=triton.next_power_of_2(words.shape[1]), num_warps=4,
        )  # fmt: skip
    return out


_LONGS = dict.fromkeys(("ids_ptr", "positions_ptr", "table_ptr", "turns_ptr", "load_ptr"), "*i64")
_WORDS = dict.fromkeys(("x_ptr", "weights_ptr", "out_ptr"), "*i32")
AOT = [
    (
        exchange_pack_kernel,
        _LONGS | _WORDS | {"width": "i32:16", "copies": "i32"},
        {"TOP_K": 6, "PADDED_K": 8, "PADDED_WIDTH": width},
        {"num_warps": 4},
    )
    for width in (2048, 4096)
]

"""exchange_pack in one launch, a program a token."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


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
    expert = tl.load(ids_ptr + token * TOP_K + place, mask=there, other=0)
    turn = token % tl.load(turns_ptr + expert, mask=there, other=1)
    slot = tl.load(table_ptr + expert * copies + turn, mask=there, other=0)
    counts = there & (tl.load(positions_ptr + token) >= 0)
    tl.store(out_ptr + width + place, tl.where(counts, slot, -1).to(tl.int32), mask=there)
    tl.store(out_ptr + width + TOP_K + place, tl.load(weights_ptr + token * TOP_K + place, mask=there), mask=there)
    tl.atomic_add(load_ptr + expert, tl.full([PADDED_K], 1, tl.int64), mask=counts, sem="relaxed")


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

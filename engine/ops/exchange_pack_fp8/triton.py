"""exchange_pack_fp8 in one launch, a program a row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.model.quantized import FP8_BLOCK
from engine.ops.exchange_pack_fp8 import row_words
from engine.ops.exchange_slots.triton import counted_slots
from engine.ops.triton_rounding import quantize

BLOCK = tl.constexpr(FP8_BLOCK)


@triton.jit(do_not_specialize=["tokens"])
def exchange_pack_fp8_kernel(
    x_ptr, ids_ptr, weights_ptr, positions_ptr, table_ptr, turns_ptr, load_ptr, out_ptr, tokens, groups, copies, words,
    TOP_K: tl.constexpr, PADDED_GROUPS: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """The weights are 32-bit words, `words` of them make a row of out."""
    token = tl.program_id(0).to(tl.int64)
    is_token = token < tokens
    out_ptr += token * words
    group = tl.arange(0, PADDED_GROUPS)
    channel = group[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = group[:, None] < groups
    x = tl.load(x_ptr + token * (groups * BLOCK) + channel, mask=inside & is_token, other=0.0).to(tl.float32)
    codes, scale = quantize(x, 1)
    tl.store(out_ptr.to(tl.pointer_type(tl.uint8)) + channel, codes.to(tl.uint8, bitcast=True), mask=inside)
    out_ptr += groups * (BLOCK // 4)
    tl.store(out_ptr + group[:, None], scale.to(tl.int32, bitcast=True), mask=inside)
    out_ptr += groups
    # What is left of the row: slots, weights, zeros.
    place = tl.arange(0, TAIL)
    slot = counted_slots(token, place, ids_ptr, positions_ptr, table_ptr, turns_ptr, load_ptr, copies, TOP_K, is_token)
    weighs = (place >= TOP_K) & (place < 2 * TOP_K) & is_token
    weight = tl.load(weights_ptr + token * TOP_K + place - TOP_K, mask=weighs, other=0)
    tl.store(out_ptr + place, tl.where(place < TOP_K, slot.to(tl.int32), weight), mask=place < words - groups * (BLOCK // 4 + 1))


def run(
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    positions: torch.Tensor,
    table: torch.Tensor,
    turns: torch.Tensor,
    load: torch.Tensor,
    rows: int,
) -> torch.Tensor:
    """As the reference; all contiguous."""
    assert all(tensor.is_contiguous() for tensor in (x, ids, weights, positions, table, turns, load)), f"{x.stride()=} {ids.stride()=}"
    (tokens, top_k), groups = ids.shape, x.shape[1] // FP8_BLOCK
    words = row_words(x.shape[1], top_k)
    out = torch.empty(rows, words, dtype=torch.int32, device=x.device)
    if rows:
        exchange_pack_fp8_kernel[(rows,)](
            x, ids, weights.view(torch.int32), positions, table, turns, load, out, tokens, groups, table.shape[1], words,
            TOP_K=top_k, PADDED_GROUPS=triton.next_power_of_2(groups),
            TAIL=triton.next_power_of_2(words - groups * (FP8_BLOCK // 4 + 1)), num_warps=4,
        )  # fmt: skip
    return out


_LONGS = dict.fromkeys(("ids_ptr", "positions_ptr", "table_ptr", "turns_ptr", "load_ptr"), "*i64")
_NUMBERS = {"tokens": "i32", "copies": "i32", "words": "i32:16"}
AOT = [
    (
        exchange_pack_fp8_kernel,
        _LONGS | {"x_ptr": "*bf16", "weights_ptr": "*i32", "out_ptr": "*i32", "groups": kind} | _NUMBERS,
        {"TOP_K": 6, "PADDED_GROUPS": groups, "TAIL": 32},
        {"num_warps": 4},
    )
    for groups, kind in ((32, "i32:16"), (64, "i32"))
]

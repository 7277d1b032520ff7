"""exchange_take in one launch, a program a row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.ops.exchange_take import Taken


@triton.jit
def exchange_take_kernel(
    codes_ptr, scales_ptr, counts_ptr, out_ptr, out_scales_ptr, ids_ptr, weights_ptr, places_ptr, experts, room, words, groups,
    expert_stride, row_stride, group_stride, PADDED_EXPERTS: tl.constexpr, PADDED_WORDS: tl.constexpr, PADDED_GROUPS: tl.constexpr,
):  # fmt: skip
    """Codes are 32-bit words; strides of the scales."""
    number = tl.program_id(0).to(tl.int64)
    every = tl.arange(0, PADDED_EXPERTS)
    counts = tl.load(counts_ptr + every, mask=every < experts, other=0).to(tl.int64)
    ends = tl.cumsum(counts, 0)
    before = ends <= number
    is_row = number < tl.sum(counts, 0)
    expert = tl.sum((before & (every < experts)).to(tl.int64), 0)
    row = number - tl.sum(tl.where(before, counts, 0), 0)
    place = expert * room + row
    tl.store(ids_ptr + number, tl.where(is_row, expert, -1))
    tl.store(weights_ptr + number, 1.0)
    tl.store(places_ptr + number, tl.where(is_row, place, -1))
    word = tl.arange(0, PADDED_WORDS)
    there = (word < words) & is_row
    tl.store(out_ptr + number * words + word, tl.load(codes_ptr + place * words + word, mask=there), mask=there)
    group = tl.arange(0, PADDED_GROUPS)
    there = (group < groups) & is_row
    scale = tl.load(scales_ptr + expert * expert_stride + row * row_stride + group * group_stride, mask=there)
    tl.store(out_scales_ptr + number * groups + group, scale, mask=there)


def run(codes: torch.Tensor, scales: torch.Tensor, counts: torch.Tensor, most: int) -> Taken:
    """As the reference."""
    experts, room, width = codes.shape
    assert codes.is_contiguous() and counts.is_contiguous(), f"{codes.stride()=} {counts.stride()=}"
    words, groups, device = width // 4, scales.shape[2], codes.device
    out = torch.empty(most, width, dtype=codes.dtype, device=device)
    out_scales = torch.empty(most, groups, dtype=torch.float32, device=device)
    ids, places = (torch.empty(most, dtype=torch.int64, device=device) for _ in range(2))
    weights = torch.empty(most, 1, dtype=torch.float32, device=device)
    if most:
        exchange_take_kernel[(most,)](
            codes.view(torch.int32), scales, counts, out.view(torch.int32), out_scales, ids, weights, places, experts, room, words, groups,
            *scales.stride(), PADDED_EXPERTS=triton.next_power_of_2(experts), PADDED_WORDS=triton.next_power_of_2(words),
            PADDED_GROUPS=triton.next_power_of_2(groups), num_warps=4,
        )  # fmt: skip
    return out, out_scales, ids[:, None], weights, places


_POINTERS = {"codes_ptr": "*i32", "scales_ptr": "*fp32", "counts_ptr": "*i32", "out_ptr": "*i32", "out_scales_ptr": "*fp32"}
_POINTERS |= {"ids_ptr": "*i64", "weights_ptr": "*fp32", "places_ptr": "*i64"}
_NUMBERS = dict.fromkeys(("experts", "room", "groups", "expert_stride", "row_stride", "group_stride"), "i32") | {"words": "i32:16"}
AOT = [
    (
        exchange_take_kernel,
        _POINTERS | _NUMBERS,
        {"PADDED_EXPERTS": experts, "PADDED_WORDS": words, "PADDED_GROUPS": words // 32},
        {"num_warps": 4},
    )
    for experts, words in ((128, 1024), (8, 2048))
]

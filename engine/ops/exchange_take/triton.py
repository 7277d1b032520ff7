"""exchange_take in one launch, a program a row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.model.quantized import FP8_BLOCK
from engine.ops.triton_rounding import to_bf16


@triton.jit
def exchange_take_kernel(
    codes_ptr, scales_ptr, counts_ptr, x_ptr, ids_ptr, places_ptr, experts, room, width, expert_stride, row_stride, group_stride,
    PADDED_EXPERTS: tl.constexpr, PADDED_WIDTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Strides of the scales."""
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
    tl.store(places_ptr + number, tl.where(is_row, place, -1))
    word = tl.arange(0, PADDED_WIDTH)
    there = (word < width) & is_row
    codes = tl.load(codes_ptr + place * width + word, mask=there, other=0.0).to(tl.float32)
    at = expert * expert_stride + row * row_stride + word // GROUP * group_stride
    scales = tl.load(scales_ptr + at, mask=there, other=0.0)
    tl.store(x_ptr + number * width + word, to_bf16(tl.where(there, codes * scales, 0.0)), mask=word < width)


def run(codes: torch.Tensor, scales: torch.Tensor, counts: torch.Tensor, most: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As the reference."""
    experts, room, width = codes.shape
    assert codes.is_contiguous() and counts.is_contiguous(), f"{codes.stride()=} {counts.stride()=}"
    x = torch.empty(most, width, dtype=torch.bfloat16, device=codes.device)
    ids, places = (torch.empty(most, dtype=torch.int64, device=codes.device) for _ in range(2))
    if most:
        exchange_take_kernel[(most,)](
            codes, scales, counts, x, ids, places, experts, room, width, *scales.stride(),
            PADDED_EXPERTS=triton.next_power_of_2(experts), PADDED_WIDTH=triton.next_power_of_2(width), GROUP=FP8_BLOCK, num_warps=4,
        )  # fmt: skip
    return x, ids[:, None], places


_LONGS = dict.fromkeys(("ids_ptr", "places_ptr"), "*i64")
_POINTERS = {"codes_ptr": "*fp8e4nv", "scales_ptr": "*fp32", "counts_ptr": "*i32", "x_ptr": "*bf16"} | _LONGS
_NUMBERS = dict.fromkeys(("experts", "room", "expert_stride", "group_stride"), "i32") | {"width": "i32:16", "row_stride": "i32"}
AOT = [
    (
        exchange_take_kernel,
        _POINTERS | _NUMBERS,
        {"PADDED_EXPERTS": experts, "PADDED_WIDTH": width, "GROUP": FP8_BLOCK},
        {"num_warps": 4},
    )
    for experts, width in ((128, 4096), (8, 8192))
]

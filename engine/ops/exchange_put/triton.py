"""exchange_put in one launch, a program a row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def exchange_put_kernel(rows_ptr, places_ptr, buffer_ptr, width, row_stride, PADDED_WIDTH: tl.constexpr):
    number = tl.program_id(0).to(tl.int64)
    place = tl.load(places_ptr + number)
    word = tl.arange(0, PADDED_WIDTH)
    there = (word < width) & (place >= 0)
    values = tl.load(rows_ptr + number * width + word, mask=there)
    tl.store(buffer_ptr + place * row_stride + word, values, mask=there)


def run(rows: torch.Tensor, places: torch.Tensor, buffer: torch.Tensor) -> None:
    """As the reference."""
    _, room, width = buffer.shape
    assert rows.dtype == buffer.dtype and rows.is_contiguous() and places.is_contiguous() and buffer.stride(2) == 1, (
        f"{rows.stride()=} {buffer.stride()=}"
    )
    assert buffer.stride(0) == room * buffer.stride(1), f"rows of experts are not at equal distances: {buffer.stride()}"
    if len(rows):
        exchange_put_kernel[(len(rows),)](
            rows, places, buffer, width, buffer.stride(1), PADDED_WIDTH=triton.next_power_of_2(width), num_warps=4
        )  # fmt: skip


AOT = [
    (
        exchange_put_kernel,
        {"rows_ptr": "*bf16", "places_ptr": "*i64", "buffer_ptr": "*bf16", "width": "i32:16", "row_stride": "i32:16"},
        {"PADDED_WIDTH": width},
        {"num_warps": 4},
    )
    for width in (4096, 8192)
]

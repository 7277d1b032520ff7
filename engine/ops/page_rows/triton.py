"""page_rows in one launch, a program some entries of a token."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.batch import TokenPlaces

BLOCK = 512


@triton.jit(do_not_specialize=["table_stride"])
def page_rows_kernel(numbers_ptr, sequences_ptr, table_ptr, out_ptr, count, table_stride, per_page, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    number = tl.load(numbers_ptr + token * count + place, mask=place < count, other=-1)
    table_ptr += tl.load(sequences_ptr + token) * table_stride
    page = tl.load(table_ptr + number // per_page, mask=number >= 0, other=0)
    tl.store(out_ptr + token * count + place, tl.where(number >= 0, page * per_page + number % per_page, -1), mask=place < count)


def run(numbers: torch.Tensor, places: TokenPlaces, per_page: int) -> torch.Tensor:
    """As the reference; numbers contiguous."""
    assert numbers.is_contiguous() and numbers.dtype == torch.int32, f"{numbers.dtype} {numbers.stride()}"
    (tokens, count), table = numbers.shape, places.page_table_SP
    out = torch.empty_like(numbers)
    if out.numel():
        grid = (tokens, triton.cdiv(count, BLOCK))
        page_rows_kernel[grid](numbers, places.sequences_T, table, out, count, table.stride(0), per_page, BLOCK=BLOCK, num_warps=4)
    return out


_TYPES = dict.fromkeys(("numbers_ptr", "table_ptr", "out_ptr"), "*i32") | {"sequences_ptr": "*i64", "table_stride": "i32"}
AOT = [(page_rows_kernel, _TYPES | {"count": "i32:16", "per_page": "i32:16"}, {"BLOCK": BLOCK}, {"num_warps": 4})]

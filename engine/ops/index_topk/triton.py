"""Selection in Triton: the alternative to cuda.py where there is no run-time compiler.

A row is cut into groups of 32 consecutive scores. The k groups with the largest maxima (the earlier one among equals) hold the k
best scores: a score in any other group has k maxima before it. So: maxima of all groups, the k best groups, the k best scores in them;
each selection bisects the bits of the k-th largest key, and keeps the order of indices.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

GROUP = 32
SHORT = 8192
"""Scores of a row that are selected from without groups."""
CHUNK = 4096
"""Scores of one program of the first kernel."""


@triton.jit(do_not_specialize=["row_stride", "num_scores", "num_groups"])
def group_maxima_kernel(scores_ptr, visible_ptr, maxima_ptr, row_stride, num_scores, num_groups, k, CHUNK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * CHUNK
    count = tl.minimum(tl.load(visible_ptr + row), num_scores)
    if (count > k) & (first < count):
        column = first + tl.arange(0, CHUNK)
        scores = tl.load(scores_ptr + row * row_stride + column, mask=column < count, other=float("-inf"))
        maxima = tl.max(tl.reshape(scores, [CHUNK // 32, 32]), 1)
        group = first // 32 + tl.arange(0, CHUNK // 32)
        tl.store(maxima_ptr + row * num_groups + group, maxima, mask=group * 32 < count)


@triton.jit(do_not_specialize=["row_stride", "num_scores"])
def select_kernel(
    values_ptr,
    groups_ptr,
    visible_ptr,
    chosen_ptr,
    row_stride,
    num_scores,
    k,
    NUM: tl.constexpr,
    PADDED_K: tl.constexpr,
    KIND: tl.constexpr,
):
    """KIND "scores": values are scores; "groups": values are groups' maxima; "members": scores of the groups in groups_ptr."""
    row = tl.program_id(0).to(tl.int64)
    count = tl.minimum(tl.load(visible_ptr + row), num_scores).to(tl.int32)
    place = tl.arange(0, PADDED_K)
    if count <= k:
        if KIND != "groups":
            tl.store(chosen_ptr + row * k + place, tl.where(place < count, place, -1), mask=place < k)
    else:
        number = tl.arange(0, NUM)
        if KIND == "members":
            group = tl.load(groups_ptr + row * k + number // 32, mask=number // 32 < k, other=-1)
            index = tl.where(group >= 0, group * 32 + number % 32, count)
        else:
            index = number
        if KIND == "groups":
            there = index * 32 < count
        else:
            there = index < count
        values = tl.load(values_ptr + row * row_stride + index, mask=there, other=0.0) + 0.0
        bits = values.to(tl.uint32, bitcast=True)
        keys = tl.where(bits >= 0x80000000, bits ^ 0xFFFFFFFF, bits | 0x80000000)
        keys = tl.where(there, keys, 0)
        cut = tl.full([], 0, tl.uint32)
        bit = tl.full([], 0x80000000, tl.uint32)
        for _ in range(32):
            trial = cut | bit
            enough = tl.sum((keys >= trial).to(tl.int32), 0) >= k
            cut = tl.where(enough, trial, cut)
            bit = bit >> 1
        above = (keys > cut).to(tl.int32)
        equal = ((keys == cut) & there).to(tl.int32)
        num_above = tl.sum(above, 0)
        num_equal = tl.sum(equal, 0)
        ties = tl.minimum(k - num_above, num_equal)
        equal_before = tl.cumsum(equal, 0) - equal
        taken = (above == 1) | ((equal == 1) & (equal_before < ties))
        at = tl.cumsum(taken.to(tl.int32), 0) - 1
        tl.store(chosen_ptr + row * k + at, index, mask=taken)
        tl.store(chosen_ptr + row * k + place, -1, mask=(place >= num_above + ties) & (place < k))


def run(logits: torch.Tensor, num_visible: torch.Tensor, k: int) -> torch.Tensor:
    """As the reference, indices in ascending order; logits contiguous in rows, no NaN among the visible ones."""
    rows, num_scores = logits.shape
    assert num_scores <= 1 or logits.stride(1) == 1, f"strides {logits.stride()}"
    chosen = torch.empty(rows, k, dtype=torch.int32, device=logits.device)
    if not chosen.numel():
        return chosen
    padded_k, stride = triton.next_power_of_2(k), logits.stride(0)

    def select(values: torch.Tensor, groups: torch.Tensor, out: torch.Tensor, stride: int, num: int, kind: str) -> None:
        num = max(16, triton.next_power_of_2(num))
        select_kernel[(rows,)](
            values, groups, num_visible, out, stride, num_scores, k, NUM=num, PADDED_K=padded_k, KIND=kind, num_warps=_warps(num)
        )

    if num_scores <= SHORT:
        select(logits, chosen, chosen, stride, num_scores, "scores")
        return chosen
    num_groups = triton.cdiv(num_scores, GROUP)
    maxima = torch.empty(rows, num_groups, dtype=torch.float32, device=logits.device)
    groups = torch.empty_like(chosen)
    grid = (rows, triton.cdiv(num_scores, CHUNK))
    group_maxima_kernel[grid](logits, num_visible, maxima, stride, num_scores, num_groups, k, CHUNK=CHUNK, num_warps=4)
    select(maxima, chosen, groups, num_groups, num_groups, "groups")
    select(logits, groups, chosen, stride, GROUP * k, "members")
    return chosen


def _warps(num: int) -> int:
    return min(16, max(1, num // 512))


_NUMBERS = {"num_scores": "i32", "k": "i32"}
_SELECT = {"values_ptr": "*fp32", "groups_ptr": "*i32", "visible_ptr": "*i64", "chosen_ptr": "*i32", "row_stride": "i32", **_NUMBERS}
_MAXIMA = {"scores_ptr": "*fp32", "visible_ptr": "*i64", "maxima_ptr": "*fp32", "row_stride": "i32", "num_groups": "i32", **_NUMBERS}
AOT = [(group_maxima_kernel, _MAXIMA, {"CHUNK": CHUNK}, {"num_warps": 4})] + [
    (select_kernel, _SELECT, {"NUM": num, "PADDED_K": k, "KIND": kind}, {"num_warps": _warps(num)})
    for num, k, kind in ((8192, 512, "scores"), (8192, 512, "groups"), (GROUP * 512, 512, "members"), (GROUP * 1024, 1024, "members"))
]

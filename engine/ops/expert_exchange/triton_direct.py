"""The kernels of `direct`: one sends a rank's tokens and takes in everybody's, one adds up what experts made and
does the same with the sums.

Every rank has an inbox that all ranks have mapped:

    values   [ranks, tokens, words of x]    int32: x as it is, or its FP8 codes and then their scales
    labels   [ranks, tokens, k]             int64: slot << 32 | bits of the weight
    sums     [ranks, tokens, d]             int32: bits of fp32

A word of an inbox that is EMPTY (all bits set) has not arrived. Its sender stores another value there, once; its owner reads it until it
is another one, and makes it EMPTY again. So there are no flags, no fences between data and flags, and no counters that a replayed graph
had to advance: a store of 32 or 64 aligned bits is seen whole or not at all, whatever order words travel in. Values that look EMPTY
are NaN, of bf16 twice, of fp32 or of FP8 four times, and are sent as another NaN. Slots are sent as -2 where there is none. What a rank
has for itself stays out of its inbox.

Why one inbox is enough, and nothing is stored over what is not read yet. Take ranks p and r, whose exchanges are dispatch 1, combine 1,
dispatch 2, ..., each with at least one word from every rank to every other. Each is a kernel, in this order on its rank's stream, and
does nothing before the one before it has ended.

values, labels   p stores those of dispatch n + 1 after its combine n, which ended when it had r's sums n. r sent these in its combine n,
                 which began when its dispatch n had ended, and with it all reading and emptying of what p's dispatch n had sent.
sums             p stores those of combine n + 1 after its dispatch n + 1, which ended when it had r's values n + 1. r sent these in
                 its dispatch n + 1, which began when its combine n had ended, and with it all reading and emptying of sums n.

The number of tokens may change from one exchange to the next, and be 0: an exchange leaves the whole inbox EMPTY. Programs of a kernel
send all they have to send before they wait, and there are never more than fit on the GPU at once, so none waits for one that has no
room.

A rank waits for so long (`patience`, in ticks of the GPU's clock), or until the host says in `told` that the group is lost. Then it says so
itself, what it makes is NaN, and it sends nothing any more, so that no rank takes what it made of a missing word for a result. A kernel
that is under way says so in `now`, and the next one finds it in `before`, which does not change while that one runs: all threads see the
same. For the same reason words are looked at in blocks that leave no two threads with the same word, and the outcome is that of all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from engine.model.quantized import QuantizedRows
from engine.ops.triton_rounding import INTERPRETED

PART = 512
"""Words of a row that a program moves at a time, if there are few."""
MOST_PROGRAMS = 256
"""Of a kernel: fewer than two a multiprocessor on the smallest GPU (132 of them), where two find room."""
LOOKS = 1024
"""At an inbox, between two at the clock and at what the host says, which is across PCIe."""
THREADS = tl.constexpr(128)
"""Of a program."""
TICK_BITS = tl.constexpr(20)
"""A tick is 2^20 ns, about a millisecond."""
TOLD = 512
"""Words in which the host says it, all alike."""
LEAST_BLOCK = 256
"""Labels of one rank that a program looks at, most of them masked: no fewer than fill its threads."""


@triton.jit
def _boxes(inboxes_ptr, offset, SIZE: tl.constexpr, PADDED_SIZE: tl.constexpr, kind: tl.constexpr):
    """Where the area at `offset` (bytes) of each rank's inbox begins: pointers [PADDED_SIZE, 1]."""
    rank = tl.arange(0, PADDED_SIZE)
    address = tl.load(inboxes_ptr + rank, mask=rank < SIZE, other=0) + offset
    return tl.multiple_of(tl.expand_dims(address.to(tl.pointer_type(kind)), 1), [16, 16])


@triton.jit
def _ticks(looks, LOOKS: tl.constexpr):
    """What the clock says, int64 and never 0: the latest that a thread has read, so that all have the same. The interpreter, which knows no
    assembly, counts looks."""
    if INTERPRETED:
        ticks = (looks // LOOKS).to(tl.int64)
    else:
        thread = tl.arange(0, THREADS)
        read = tl.inline_asm_elementwise("mov.u64 $0, %globaltimer;", "=l,r", [thread], dtype=tl.int64, is_pure=False, pack=1)
        ticks = tl.max(read) >> TICK_BITS
    return ticks


@triton.jit
def _take(pointers, mask, now_ptr, told_ptr, patience, LOOKS: tl.constexpr, TOLD: tl.constexpr):
    """What is at `pointers` as soon as all of it is there, which is EMPTY afterwards."""
    words = tl.load(pointers, mask=mask, other=0, volatile=True)
    missing = tl.max((words == -1).to(tl.int32))
    looks = tl.full([], 0, tl.int32)
    began = tl.full([], 0, tl.int64)
    while (missing > 0) & (patience > 0):
        words = tl.load(pointers, mask=mask, other=0, volatile=True)
        missing = tl.max((words == -1).to(tl.int32))
        looks += 1
        if looks % LOOKS == 0:
            now = _ticks(looks, LOOKS)
            began = tl.where(began == 0, now, began)
            told = tl.max(tl.load(told_ptr + tl.arange(0, TOLD), volatile=True))
            patience = tl.where((told != 0) | (now - began >= patience), 0, patience)
    if missing > 0:
        tl.store(now_ptr, 1)
        tl.store(told_ptr, 1)
    tl.debug_barrier()  # all threads have their words
    tl.store(pointers, tl.full(pointers.shape, -1, pointers.dtype.element_ty), mask=mask)
    return words


@triton.jit(do_not_specialize=["tokens", "copies", "first_slot", "num_slots", "me", "patience"])
def direct_dispatch_kernel(
    x_ptr, scales_ptr, ids_ptr, weights_ptr, positions_ptr, table_ptr, turns_ptr, load_ptr, inboxes_ptr, before_ptr, now_ptr, told_ptr,
    out_x_ptr, out_scales_ptr, out_ids_ptr, out_weights_ptr, labels_at, width, groups, scale_row_stride, scale_group_stride,
    tokens, copies, first_slot, num_slots, me, patience,
    SIZE: tl.constexpr, PADDED_SIZE: tl.constexpr, TOP_K: tl.constexpr, PADDED_K: tl.constexpr, PADDED_GROUPS: tl.constexpr,
    PART: tl.constexpr, LOOKS: tl.constexpr, TOLD: tl.constexpr,
):  # fmt: skip
    """x, the scales and the weights are 32-bit words, `width` of x in a row, and `groups` scales, behind it in an inbox, or 0.
    The last parts of a token are its labels, and its scales."""
    parts = tl.cdiv(width, PART)
    per_token = parts + 1 + tl.minimum(groups, 1)
    items = tokens * per_token
    row_words = width + groups
    source = tl.expand_dims(tl.arange(0, PADDED_SIZE), 1)
    word = tl.expand_dims(tl.arange(0, PART), 0)
    place = tl.expand_dims(tl.arange(0, PADDED_K), 0)
    group = tl.expand_dims(tl.arange(0, PADDED_GROUPS), 0)
    values = _boxes(inboxes_ptr, 0, SIZE, PADDED_SIZE, tl.int32)
    labels = _boxes(inboxes_ptr, labels_at, SIZE, PADDED_SIZE, tl.int64)
    is_alive = tl.load(before_ptr) == 0
    tl.store(now_ptr, 1, mask=is_alive == 0)
    patience = tl.where(is_alive, patience, 0)
    goes = (source < SIZE) & (source != me) & is_alive
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        token, part = item // per_token, item % per_token
        row = me * tokens + token
        if part < parts:
            at = part * PART + word
            words = tl.load(x_ptr + token * width + at, mask=at < width, other=0)
            words = tl.where(words == -1, 0x7FFF7FFF, words)
            tl.store(values + row * row_words + at, tl.broadcast_to(words, [PADDED_SIZE, PART]), mask=goes & (at < width))
            tl.store(out_x_ptr + row * width + at, words, mask=at < width)
        if part == parts:
            there = place < TOP_K
            expert = tl.load(ids_ptr + token * TOP_K + place, mask=there, other=0)
            weight = tl.load(weights_ptr + token * TOP_K + place, mask=there, other=0)
            turn = token % tl.load(turns_ptr + expert, mask=there, other=1)
            slot = tl.load(table_ptr + expert * copies + turn, mask=there, other=0)
            counts = there & (tl.load(positions_ptr + token) >= 0)
            label = (tl.where(counts, slot, -2) << 32) | (weight.to(tl.int64) & 0xFFFFFFFF)
            tl.store(labels + row * TOP_K + place, tl.broadcast_to(label, [PADDED_SIZE, PADDED_K]), mask=goes & there)
            here = counts & (slot >= first_slot) & (slot < first_slot + num_slots)
            tl.store(out_ids_ptr + row * TOP_K + place, tl.where(here, slot - first_slot, -1), mask=there)
            tl.store(out_weights_ptr + row * TOP_K + place, weight, mask=there)
            tl.atomic_add(load_ptr + expert, tl.full([1, PADDED_K], 1, tl.int64), mask=counts, sem="relaxed")
        if part > parts:
            words = tl.load(scales_ptr + token * scale_row_stride + group * scale_group_stride, mask=group < groups, other=0)
            words = tl.where(words == -1, 0x7FFF7FFF, words)
            into = values + row * row_words + width + group
            tl.store(into, tl.broadcast_to(words, [PADDED_SIZE, PADDED_GROUPS]), mask=goes & (group < groups))
            tl.store(out_scales_ptr + row * groups + group, words, mask=group < groups)
    tl.debug_barrier()
    inbox = tl.load(inboxes_ptr + me)
    my_values = tl.multiple_of(inbox.to(tl.pointer_type(tl.int32)), 16)
    my_labels = tl.multiple_of((inbox + labels_at).to(tl.pointer_type(tl.int64)), 16)
    comes = (source < SIZE) & (source != me)
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        token, part = item // per_token, item % per_token
        row = source * tokens + token
        if part < parts:
            at = part * PART + word
            mask = comes & (at < width)
            words = _take(my_values + row * row_words + at, mask, now_ptr, told_ptr, patience, LOOKS, TOLD)
            tl.store(out_x_ptr + row * width + at, words, mask=mask)
        if part == parts:
            there = comes & (place < TOP_K)
            label = _take(my_labels + row * TOP_K + place, there, now_ptr, told_ptr, patience, LOOKS, TOLD)
            slot = label >> 32
            here = (slot >= first_slot) & (slot < first_slot + num_slots)
            tl.store(out_ids_ptr + row * TOP_K + place, tl.where(here, slot - first_slot, -1), mask=there)
            tl.store(out_weights_ptr + row * TOP_K + place, label.to(tl.int32), mask=there)
        if part > parts:
            mask = comes & (group < groups)
            words = _take(my_values + row * row_words + width + group, mask, now_ptr, told_ptr, patience, LOOKS, TOLD)
            tl.store(out_scales_ptr + row * groups + group, words, mask=mask)


@triton.jit(do_not_specialize=["tokens", "me", "patience"])
def direct_combine_kernel(
    rows_ptr, ids_ptr, inboxes_ptr, before_ptr, now_ptr, told_ptr, out_ptr, sums_at, width, tokens, me, patience,
    SIZE: tl.constexpr, PADDED_SIZE: tl.constexpr, TOP_K: tl.constexpr, PART: tl.constexpr, LOOKS: tl.constexpr, TOLD: tl.constexpr,
):  # fmt: skip
    """rows: [SIZE * tokens, TOP_K, width], those for rank r at [r * tokens, (r + 1) * tokens). Adds up those with an id, in fp32 in their
    order, then what comes of it in the order of ranks."""
    parts = tl.cdiv(width, PART)
    items = tokens * parts
    source = tl.expand_dims(tl.arange(0, PADDED_SIZE), 1)
    word = tl.expand_dims(tl.arange(0, PART), 0)
    sums = _boxes(inboxes_ptr, sums_at, SIZE, PADDED_SIZE, tl.int32)
    is_alive = tl.load(before_ptr) == 0
    tl.store(now_ptr, 1, mask=is_alive == 0)
    patience = tl.where(is_alive, patience, 0)
    comes = (source < SIZE) & (source != me)
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        token, at = item // parts, (item % parts) * PART + word
        row = (source * tokens + token) * TOP_K
        sums_of = tl.zeros([PADDED_SIZE, PART], tl.float32)
        for place in tl.static_range(TOP_K):
            here = tl.load(ids_ptr + row + place, mask=source < SIZE, other=-1) >= 0
            sums_of += tl.load(rows_ptr + (row + place) * width + at, mask=here & (at < width), other=0.0).to(tl.float32)
        words = sums_of.to(tl.int32, bitcast=True)
        words = tl.where(words == -1, 0x7FFF7FFF, words)
        tl.store(sums + (me * tokens + token) * width + at, words, mask=comes & (at < width) & is_alive)
        at_1 = (item % parts) * PART + tl.arange(0, PART)
        tl.store(out_ptr + token * width + at_1, tl.sum(tl.where(source == me, sums_of, 0.0), 0), mask=at_1 < width)
    tl.debug_barrier()  # this rank's own sums are where those of all will be
    my_sums = tl.multiple_of((tl.load(inboxes_ptr + me) + sums_at).to(tl.pointer_type(tl.int32)), 16)
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        token, at = item // parts, (item % parts) * PART + word
        # Before all threads meet in `_take`, behind which the sum of all is stored there.
        mine = tl.load(out_ptr + token * width + at, mask=at < width, other=0.0)
        mask = comes & (at < width)
        words = _take(my_sums + (source * tokens + token) * width + at, mask, now_ptr, told_ptr, patience, LOOKS, TOLD)
        found = tl.where(source == me, mine, words.to(tl.float32, bitcast=True))
        total = tl.sum(tl.where(source == 0, found, 0.0), 0)
        for rank in tl.static_range(1, SIZE):
            total += tl.sum(tl.where(source == rank, found, 0.0), 0)
        at_1 = (item % parts) * PART + tl.arange(0, PART)
        tl.store(out_ptr + token * width + at_1, total, mask=at_1 < width)


@dataclass(frozen=True, slots=True)
class Cut:
    """How a kernel's words are cut into items."""

    part: int
    warps: int

    def programs(self, tokens: int, width: int, others: int) -> tuple[int]:
        """For rows of `width` words, and so many items of each token besides."""
        return (min(tokens * (triton.cdiv(width, self.part) + others), MOST_PROGRAMS),)


def cut(tokens: int, width: int, size: int) -> Cut:
    """Long parts where programs have several: more is under way at a time."""
    if tokens * triton.cdiv(width, PART) < 4 * MOST_PROGRAMS:
        return Cut(PART, 4)
    return Cut(max(PART, min(triton.next_power_of_2(width), 4096 // triton.next_power_of_2(size))), 8)


def dispatch(
    x: torch.Tensor | QuantizedRows,
    ids: torch.Tensor,
    weights: torch.Tensor,
    positions: torch.Tensor,
    choice: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    inboxes: torch.Tensor,
    labels_at: int,
    flags: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    rank: int,
    slots_per_rank: int,
    patience: int,
) -> tuple[torch.Tensor | QuantizedRows, torch.Tensor, torch.Tensor]:
    """x, ids, weights, positions and choice (table, turns, load) as `exchange_pack` takes them, the results as those of `exchange_unpack`:
    rows of rank 0, then 1, ..., in FP8 if x is. inboxes: int64 [ranks], addresses; labels_at: bytes from there; flags: int32 [1], [1] and
    [TOLD] (before, now, told)."""
    values, scale = (x, None) if isinstance(x, torch.Tensor) else (x.codes, x.scale)
    assert all(one.is_contiguous() for one in (values, ids, weights, positions, *choice)), f"{values.stride()=} {ids.stride()=}"
    words, (tokens, top_k), size = values.view(torch.int32), ids.shape, len(inboxes)
    width, groups = words.shape[1], 0 if scale is None else scale.shape[1]
    out = torch.empty(size * tokens, width, dtype=torch.int32, device=x.device)
    out_scale = out if scale is None else torch.empty(size * tokens, groups, dtype=torch.float32, device=x.device)
    out_ids = torch.empty(size * tokens, top_k, dtype=torch.int64, device=x.device)
    out_weights = torch.empty(size * tokens, top_k, dtype=torch.float32, device=x.device)
    if tokens:
        plan, strides = cut(tokens, width, size), (0, 0) if scale is None else scale.stride()
        direct_dispatch_kernel[plan.programs(tokens, width, 2 if groups else 1)](
            words, words if scale is None else scale.view(torch.int32), ids, weights.view(torch.int32), positions, *choice, inboxes, *flags,
            out, out_scale.view(torch.int32), out_ids, out_weights.view(torch.int32),
            labels_at, width, groups, *strides, tokens, choice[0].shape[1], rank * slots_per_rank, slots_per_rank, rank, patience,
            SIZE=size, PADDED_SIZE=triton.next_power_of_2(size), TOP_K=top_k, PADDED_K=max(LEAST_BLOCK, triton.next_power_of_2(top_k)),
            PADDED_GROUPS=max(LEAST_BLOCK, triton.next_power_of_2(groups)),
            PART=plan.part, LOOKS=LOOKS, TOLD=TOLD, num_warps=plan.warps,
        )  # fmt: skip
    rows = out.view(values.dtype)
    return rows if isinstance(x, torch.Tensor) else QuantizedRows(rows, out_scale, x.dtype), out_ids, out_weights


def combine(
    rows: torch.Tensor,
    ids: torch.Tensor,
    inboxes: torch.Tensor,
    sums_at: int,
    flags: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    rank: int,
    patience: int,
) -> torch.Tensor:
    """rows: [ranks * T, k, d] in any dtype, made of the rows that `dispatch` has brought with these ids; anything where an id is -1.
    Returns fp32 [T, d]."""
    assert rows.is_contiguous() and ids.is_contiguous() and rows.shape[:2] == ids.shape, f"{rows.shape} {rows.stride()} {ids.shape}"
    size, width = len(inboxes), rows.shape[2]
    tokens = len(rows) // size
    out = torch.empty(tokens, width, dtype=torch.float32, device=rows.device)
    if tokens:
        plan = cut(tokens, width, size)
        direct_combine_kernel[plan.programs(tokens, width, 0)](
            rows, ids, inboxes, *flags, out, sums_at, width, tokens, rank, patience,
            SIZE=size, PADDED_SIZE=triton.next_power_of_2(size), TOP_K=ids.shape[1],
            PART=plan.part, LOOKS=LOOKS, TOLD=TOLD, num_warps=plan.warps,
        )  # fmt: skip
    return out


_FLAGS = dict.fromkeys(("before_ptr", "now_ptr", "told_ptr"), "*i32")
_NUMBERS = dict.fromkeys(("tokens", "copies", "first_slot", "num_slots", "me", "patience"), "i32") | {"width": "i32:16"}
_SCALES = {"groups": "i32:16", "scale_row_stride": "i32", "scale_group_stride": "i32"}
_LONGS = ("ids_ptr", "positions_ptr", "table_ptr", "turns_ptr", "load_ptr", "inboxes_ptr", "out_ids_ptr")
_WORDS = ("x_ptr", "scales_ptr", "weights_ptr", "out_x_ptr", "out_scales_ptr", "out_weights_ptr")


def _sizes(tokens: int, width: int) -> Iterator[tuple[dict[str, int], dict[str, int]]]:
    for size in (2, 3, 4, 8):
        plan = cut(tokens, width, size)
        constants = {"SIZE": size, "PADDED_SIZE": triton.next_power_of_2(size), "PART": plan.part, "LOOKS": LOOKS, "TOLD": TOLD}
        yield constants, {"num_warps": plan.warps}


AOT = [
    (
        direct_dispatch_kernel,
        dict.fromkeys(_LONGS, "*i64") | dict.fromkeys(_WORDS, "*i32") | _FLAGS | _NUMBERS | _SCALES | {"labels_at": "i32:16"},
        sizes | {"TOP_K": 6, "PADDED_K": LEAST_BLOCK, "PADDED_GROUPS": LEAST_BLOCK},
        options,
    )
    for tokens, width in ((1, 1024), (256, 1792))
    for sizes, options in _sizes(tokens, width)
] + [
    (
        direct_combine_kernel,
        {"rows_ptr": "*bf16", "ids_ptr": "*i64", "inboxes_ptr": "*i64", "out_ptr": "*fp32", "sums_at": "i32:16"}
        | _FLAGS
        | {name: _NUMBERS[name] for name in ("width", "tokens", "me", "patience")},
        sizes | {"TOP_K": 6},
        options,
    )
    for tokens in (1, 256)
    for sizes, options in _sizes(tokens, 4096)
]  # fmt: skip

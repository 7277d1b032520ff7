"""What top-k, top-p and min-p keep, without sorting.

Top-k and top-p keep the first tokens in order of logit down, then id up. That order is an integer of 32 + ID_BITS bits, larger for
earlier tokens, all different; the least one kept is the least for which the tokens above it are fewer than k, or together less likely
than p. It is searched for by numbers and masses (`engine.ops.sample.masses`) of the tokens above some bounds, all integers: their
sums do not depend on who is added first. For each of top-k and top-p:

    coarse     a block of tokens: how many, or how likely, are those above each of PIVOTS logits, chosen for their distance from the largest
    collect    a block: those of its tokens that lie between the two logits between which the least one kept must be, into the row's list
    finish     a row: of the list a 16th, a 256th, ..., until one is left

Rows that want no filter leave each at once. Bounds decide how long the lists are and nothing else.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl

from engine.ops.sample import LOG2_E, POWER_TERMS, Draws, Histories
from engine.ops.sample.triton_logits import aot, history_arguments, load_logits

CHUNK = 1024
"""Tokens of a list that are looked at in one go."""
FEW_ROWS = 8
"""For so few there are more programs and pivots: the multiprocessors have room, and lists become shorter."""
COARSE_OPTIONS = {"num_warps": 4, "maxnreg": 168}
_T0, _T1, _T2, _T3, _T4, _T5 = (tl.constexpr(term) for term in POWER_TERMS)
_LOG2_E = tl.constexpr(LOG2_E)
_LOWEST = tl.constexpr(-(2**31))


@triton.jit
def _key(logits):
    """int32, larger for larger logits."""
    bits = (logits + 0.0).to(tl.int32, bitcast=True)  # -0 becomes 0
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _first_order(key, ID_BITS: tl.constexpr):
    """The least order of tokens with this key."""
    return (key.to(tl.int64) + 2147483648) << ID_BITS


@triton.jit
def _order(logits, token, ID_BITS: tl.constexpr):
    return _first_order(_key(logits), ID_BITS) | ((1 << ID_BITS) - 1 - token)


@triton.jit
def _logits_of(order, ID_BITS: tl.constexpr):
    key = ((order >> ID_BITS) - 2147483648).to(tl.int32)
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def kept(logits, token, floor, ID_BITS: tl.constexpr):
    """Logits, -inf where a filter excludes the token."""
    return tl.where(_order(logits, token, ID_BITS) >= floor, logits, float("-inf"))


@triton.jit
def _less(term: tl.constexpr, part, power):
    """term - part * power, part in units of 2^-32."""
    return tl.full(part.shape, term, tl.uint32) - tl.umulhi(part, power)


@triton.jit
def _masses(logits, top, temperature):
    """int32; as `engine.ops.sample.masses`, bit for bit."""
    inverse = tl.minimum(1.0 / temperature, 1e30).to(tl.float32)
    halvings = (top - logits) * inverse * _LOG2_E
    is_likely = halvings < 31.0
    fixed = (tl.where(is_likely, halvings, 0.0) * 16777216.0).to(tl.int32)
    whole = fixed >> 24
    part = fixed.to(tl.uint32) << 8
    power = _less(_T4, part, tl.full(part.shape, _T5, tl.uint32))
    power = _less(_T0, part, _less(_T1, part, _less(_T2, part, _less(_T3, part, power)))).to(tl.int32)
    return tl.where(is_likely, (power + ((1 << whole) >> 1)) >> whole, 0)


@triton.jit
def _wants(temperature_ptr, top_k_ptr, top_p_ptr, row, BY_MASS: tl.constexpr):
    if BY_MASS:
        wants = tl.load(top_p_ptr + row) < 1
    else:
        wants = tl.load(top_k_ptr + row) > 0
    return wants & (tl.load(temperature_ptr + row) > 0)


@triton.jit
def sample_top_kernel(
    logits_ptr, slot_ptr, words_ptr, terms_ptr, adjusted_ptr, top_ptr, floor_ptr, sums_ptr, length_ptr, rows, vocab,
    ADJUST: tl.constexpr, PAIRS: tl.constexpr, PIVOTS: tl.constexpr,
):  # fmt: skip
    """The largest logit of a block; the adjusted ones, which the other kernels would compute many times; what they count in, and the
    least order kept, become 0."""
    row = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * (2 * PAIRS) + tl.arange(0, 2 * PAIRS)
    logits = load_logits(logits_ptr, slot_ptr, words_ptr, terms_ptr, row, token, vocab, ADJUST)
    if ADJUST:
        tl.store(adjusted_ptr + row * vocab + token, logits, mask=token < vocab)
    tl.store(top_ptr + row * tl.num_programs(1) + tl.program_id(1), tl.max(logits, 0))
    if tl.program_id(1) == 0:
        tl.store(floor_ptr + row, tl.zeros([], tl.int64))
        for stage in tl.static_range(2):
            at = stage * rows + row
            tl.store(sums_ptr + at * PIVOTS + tl.arange(0, PIVOTS), tl.zeros([PIVOTS], tl.int64))
            tl.store(length_ptr + at, 0)


@triton.jit
def _top(top_ptr, row, blocks, PADDED_BLOCKS: tl.constexpr):
    block = tl.arange(0, PADDED_BLOCKS)
    return tl.max(tl.load(top_ptr + row * blocks + block, mask=block < blocks, other=float("-inf")), 0)


@triton.jit
def _least_top(top_ptr, row, blocks, PADDED_BLOCKS: tl.constexpr):
    block = tl.arange(0, PADDED_BLOCKS)
    return tl.min(tl.load(top_ptr + row * blocks + block, mask=block < blocks, other=float("inf")), 0)


@triton.jit
def sample_coarse_kernel(
    logits_ptr, top_ptr, temperature_ptr, top_k_ptr, top_p_ptr, floor_ptr, sums_ptr, bound_ptr, vocab, tops,
    BY_MASS: tl.constexpr, ID_BITS: tl.constexpr, PADDED_BLOCKS: tl.constexpr, PIVOTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Pivots go down in equal steps; the last is below all. For top-p the last but one is as low as it can be needed: all that is below
    is less than 1 - p. For top-k they span 4 times what the blocks' largest logits do."""
    row = tl.program_id(0).to(tl.int64)
    if _wants(temperature_ptr, top_k_ptr, top_p_ptr, row, BY_MASS):
        token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        logits = tl.load(logits_ptr + row * vocab + token, mask=token < vocab, other=float("-inf"))
        key = _key(logits)
        top = _top(top_ptr, row, tops, PADDED_BLOCKS)
        if BY_MASS:
            temperature = tl.load(temperature_ptr + row)
            rest = tl.maximum(1 - tl.load(top_p_ptr + row), 1e-9).to(tl.float32)
            span = tl.log(vocab / rest) * temperature.to(tl.float32)
            weight = _masses(logits, top, temperature)
            takes_part = (token < vocab) & (_order(logits, token, ID_BITS) >= tl.load(floor_ptr + row))
            weight = tl.where(takes_part, weight, 0).to(tl.uint32)  # 32 bits to choose between, 64 to add
        else:
            span = (top - _least_top(top_ptr, row, tops, PADDED_BLOCKS)) * 4
            weight = (token < vocab).to(tl.uint32)
        pivot = tl.arange(0, PIVOTS)
        sums = tl.zeros([PIVOTS], tl.int64)
        bounds = tl.full([PIVOTS], _LOWEST, tl.int32)
        for index in tl.static_range(PIVOTS):
            if index + 1 < PIVOTS:
                bound = _key(top - span * ((index + 1) / (PIVOTS - 1)))
                above = tl.sum(tl.where(key >= bound, weight, 0).to(tl.int64 if BY_MASS else tl.int32), 0)
                bounds = tl.where(pivot == index, bound, bounds)
            else:
                above = tl.sum(weight.to(tl.int64 if BY_MASS else tl.int32), 0)
            sums = tl.where(pivot == index, above.to(tl.int64), sums)
        tl.atomic_add(sums_ptr + row * PIVOTS + pivot, sums)
        if tl.program_id(1) == 0:
            tl.store(bound_ptr + row * PIVOTS + pivot, bounds)


@triton.jit
def _between(top_k_ptr, top_p_ptr, sums_ptr, bound_ptr, row, BY_MASS: tl.constexpr, PIVOTS: tl.constexpr):
    """(float64 limit; sum above high; low and high: keys; whether the least one kept is in low .. high - 1; else all are kept)."""
    pivot = tl.arange(0, PIVOTS)
    sums = tl.load(sums_ptr + row * PIVOTS + pivot)
    bounds = tl.load(bound_ptr + row * PIVOTS + pivot)
    if BY_MASS:
        limit = tl.maximum(tl.load(top_p_ptr + row) * tl.max(sums, 0).to(tl.float64), 0.5)
    else:
        limit = tl.load(top_k_ptr + row).to(tl.float64)
    enough = sums.to(tl.float64) >= limit
    above = tl.max(tl.where(enough, 0, sums), 0)
    low = tl.max(tl.where(enough, bounds, _LOWEST), 0)
    high = tl.min(tl.where(enough, 0x7FFFFFFF, bounds), 0)
    return limit, above, low, high, tl.max(enough.to(tl.int32), 0) > 0


@triton.jit
def sample_collect_kernel(
    logits_ptr, temperature_ptr, top_k_ptr, top_p_ptr, sums_ptr, bound_ptr, length_ptr, order_ptr, vocab,
    BY_MASS: tl.constexpr, ID_BITS: tl.constexpr, PIVOTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    if _wants(temperature_ptr, top_k_ptr, top_p_ptr, row, BY_MASS):
        _, _, low, high, some = _between(top_k_ptr, top_p_ptr, sums_ptr, bound_ptr, row, BY_MASS, PIVOTS)
        token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        logits = tl.load(logits_ptr + row * vocab + token, mask=token < vocab, other=float("-inf"))
        key = _key(logits)
        found = ((token < vocab) & (key >= low) & (key < high) & some).to(tl.int32)
        number = tl.sum(found, 0)
        if number > 0:
            start = tl.atomic_add(length_ptr + row, number)
            at = row * vocab + start + tl.cumsum(found, 0) - 1
            tl.store(order_ptr + at, _order(logits, token, ID_BITS), mask=found > 0)


@triton.jit
def sample_finish_kernel(
    top_ptr, temperature_ptr, top_k_ptr, top_p_ptr, floor_ptr, sums_ptr, bound_ptr, length_ptr, order_ptr, mass_ptr, vocab, tops,
    BY_MASS: tl.constexpr, ID_BITS: tl.constexpr, PADDED_BLOCKS: tl.constexpr, PIVOTS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    if _wants(temperature_ptr, top_k_ptr, top_p_ptr, row, BY_MASS):
        limit, above, low_key, high_key, some = _between(top_k_ptr, top_p_ptr, sums_ptr, bound_ptr, row, BY_MASS, PIVOTS)
        low, high = _first_order(low_key, ID_BITS), _first_order(high_key, ID_BITS)
        length = tl.load(length_ptr + row)
        floor = tl.load(floor_ptr + row)
        if BY_MASS:
            top = _top(top_ptr, row, tops, PADDED_BLOCKS)
            temperature = tl.load(temperature_ptr + row)
            for start in range(0, length, CHUNK):
                place = start + tl.arange(0, CHUNK)
                order = tl.load(order_ptr + row * vocab + place, mask=place < length, other=0)
                mass = _masses(_logits_of(order, ID_BITS), top, temperature)
                tl.store(mass_ptr + row * vocab + place, tl.where(order >= floor, mass, 0), mask=place < length)
            tl.debug_barrier()
        digit = tl.arange(0, 16)
        # the tokens from low on reach the limit, those from high on do not
        while some & (length > 1) & (low + 1 < high):
            bound = low + digit * ((high - 1 - low) // 16 + 1)
            sums = tl.full([16], 0, tl.int64) + above
            for start in range(0, length, CHUNK):
                place = start + tl.arange(0, CHUNK)
                order = tl.load(order_ptr + row * vocab + place, mask=place < length, other=-1)
                if BY_MASS:
                    weight = tl.load(mass_ptr + row * vocab + place, mask=place < length, other=0).to(tl.int64)
                    sums += tl.sum(tl.where(order[:, None] >= bound[None, :], weight[:, None], 0), 0)
                else:
                    sums += tl.sum((order[:, None] >= bound[None, :]).to(tl.int32), 0).to(tl.int64)
            enough = (sums.to(tl.float64) >= limit) | (digit == 0)
            above = tl.maximum(above, tl.max(tl.where(enough, 0, sums), 0))
            low = tl.max(tl.where(enough, bound, low), 0)
            high = tl.minimum(high, tl.min(tl.where(enough, high, bound), 0))
            left = tl.full([], 0, tl.int32)
            for start in range(0, length, CHUNK):
                place = start + tl.arange(0, CHUNK)
                order = tl.load(order_ptr + row * vocab + place, mask=place < length, other=-1)
                found = ((order >= low) & (order < high)).to(tl.int32)
                at = row * vocab + left + tl.cumsum(found, 0) - 1
                left += tl.sum(found, 0)
                if BY_MASS:
                    weight = tl.load(mass_ptr + row * vocab + place, mask=place < length, other=0)
                    tl.debug_barrier()  # all of the chunk are read before others take their places
                    tl.store(mass_ptr + at, weight, mask=found > 0)
                else:
                    tl.debug_barrier()
                tl.store(order_ptr + at, order, mask=found > 0)
            length = left
            tl.debug_barrier()
        if some:
            tl.store(floor_ptr + row, tl.maximum(floor, low))


@triton.jit
def sample_least_kernel(top_ptr, temperature_ptr, min_p_ptr, floor_ptr, tops, ID_BITS: tl.constexpr, PADDED_BLOCKS: tl.constexpr):
    """Raises the least order kept to what min-p wants: the least logit with (logit - largest) / temperature >= log(min_p), found byte by
    byte, -infinity excluded."""
    row = tl.program_id(0).to(tl.int64)
    min_p = tl.load(min_p_ptr + row)
    temperature = tl.load(temperature_ptr + row)
    if (min_p > 0) & (temperature > 0):
        top = _top(top_ptr, row, tops, PADDED_BLOCKS)
        lowest = tl.log(min_p)
        excluded = tl.full([], 0, tl.int64)  # 2^31 + key of the largest excluded one, but for the bytes not found yet
        for step in tl.static_range(4):
            candidate = excluded + (tl.arange(0, 256).to(tl.int64) << (24 - 8 * step))
            tempered = (_logits_of(candidate, 0).to(tl.float64) - top.to(tl.float64)) / temperature
            is_excluded = (candidate <= 8388607) | (tempered < lowest)  # 8388607: -infinity's
            excluded = tl.max(tl.where(is_excluded, candidate, excluded), 0)
        tl.store(floor_ptr + row, tl.maximum(tl.load(floor_ptr + row), (excluded + 1) << ID_BITS))


def thresholds(logits: torch.Tensor, draws: Draws, histories: Histories | None, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits, adjusted; least order kept, int64 [S])."""
    filters = draws.filters
    if filters is None:
        return logits, draws.seed  # of the right type, and not read
    rows, vocab = logits.shape
    tops = triton.cdiv(vocab, block)
    size, pivots = (1024, 32) if rows <= FEW_ROWS else (4096, 8)
    new = functools.partial(torch.empty, device=logits.device)
    floor, top = torch.empty_like(draws.seed), new(rows, tops)
    sums, bounds, lengths = new(2, rows, pivots, dtype=torch.int64), new(rows, pivots, dtype=torch.int32), new(2, rows, dtype=torch.int32)
    orders, masses = new(rows, vocab, dtype=torch.int64), new(rows, vocab, dtype=torch.int32)
    adjusted = logits if histories is None else torch.empty_like(logits)
    id_bits, padded = max(1, (vocab - 1).bit_length()), triton.next_power_of_2(tops)
    sample_top_kernel[(rows, tops)](
        logits, *history_arguments(draws, histories), adjusted, top, floor, sums, lengths, rows, vocab, ADJUST=histories is not None,
        PAIRS=block // 2, PIVOTS=pivots, num_warps=8,
    )  # fmt: skip
    top_k, top_p = draws.seed if filters.top_k is None else filters.top_k, draws.temperature if filters.top_p is None else filters.top_p
    wishes, grid = (draws.temperature, top_k, top_p), (rows, triton.cdiv(vocab, size))
    for by_mass in [False] * (filters.top_k is not None) + [True] * (filters.top_p is not None):
        found, length = (sums[int(by_mass)], bounds), lengths[int(by_mass)]
        searched: dict[str, Any] = {"BY_MASS": by_mass, "PIVOTS": pivots, "ID_BITS": id_bits}
        sample_coarse_kernel[grid](
            adjusted, top, *wishes, floor, *found, vocab, tops, BLOCK=size, PADDED_BLOCKS=padded, **searched, **COARSE_OPTIONS
        )
        sample_collect_kernel[grid](adjusted, *wishes, *found, length, orders, vocab, BLOCK=size, **searched, num_warps=4)
        sample_finish_kernel[(rows,)](
            top, *wishes, floor, *found, length, orders, masses, vocab, tops, CHUNK=CHUNK, PADDED_BLOCKS=padded, **searched, num_warps=16
        )
    if filters.min_p is not None:
        sample_least_kernel[(rows,)](top, draws.temperature, filters.min_p, floor, tops, ID_BITS=id_bits, PADDED_BLOCKS=padded, num_warps=8)
    return adjusted, floor


_KINDS: list[dict[str, Any]] = [{"BY_MASS": by_mass, "PIVOTS": 8, "ID_BITS": 17} for by_mass in (False, True)]
AOT = [
    aot(sample_top_kernel, {"num_warps": 8}, ADJUST=True, PAIRS=2048, PIVOTS=8),
    *(aot(sample_coarse_kernel, COARSE_OPTIONS, BLOCK=4096, PADDED_BLOCKS=32, **kind) for kind in _KINDS),
    *(aot(sample_collect_kernel, {"num_warps": 4}, BLOCK=4096, **kind) for kind in _KINDS),
    *(aot(sample_finish_kernel, {"num_warps": 16}, CHUNK=CHUNK, PADDED_BLOCKS=32, **kind) for kind in _KINDS),
    aot(sample_least_kernel, {"num_warps": 8}, ID_BITS=17, PADDED_BLOCKS=32),
]

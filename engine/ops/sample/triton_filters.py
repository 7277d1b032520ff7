"""What top-k, top-p and min-p keep.

Top-k and top-p keep the first tokens in order of logit down, then id up. That order is an integer of 32 + ID_BITS bits, larger for
earlier tokens, all different; the least one kept is the least for which the tokens above it are fewer than k, or together less likely
than p. It is found digit by digit:

    narrow    a block of tokens, for each value of the next digit: how many, or how likely, are those above; before that the digit
              before, from the sums over all blocks
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.ops.sample import Draws, Histories
from engine.ops.sample.triton_logits import aot, history_arguments, load_logits

CHUNK = 512
DIGIT_BITS = 4


@triton.jit
def _order(logits, token, ID_BITS: tl.constexpr):
    bits = (logits + 0.0).to(tl.int32, bitcast=True)  # -0 becomes 0
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return ((key.to(tl.int64) + 2147483648) << ID_BITS) | ((1 << ID_BITS) - 1 - token)


@triton.jit
def sample_top_kernel(
    logits_ptr, slot_ptr, words_ptr, terms_ptr, adjusted_ptr, top_ptr, vocab, ADJUST: tl.constexpr, PAIRS: tl.constexpr
):  # fmt: skip
    """The largest logit of a block; and the adjusted ones, which the other kernels would compute many times."""
    row = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * (2 * PAIRS) + tl.arange(0, 2 * PAIRS)
    logits = load_logits(logits_ptr, slot_ptr, words_ptr, terms_ptr, row, token, vocab, ADJUST)
    if ADJUST:
        tl.store(adjusted_ptr + row * vocab + token, logits, mask=token < vocab)
    tl.store(top_ptr + row * tl.num_programs(1) + tl.program_id(1), tl.max(logits, 0))


@triton.jit
def largest_of(top_ptr, row, blocks, PADDED_BLOCKS: tl.constexpr):
    block = tl.arange(0, PADDED_BLOCKS)
    return tl.max(tl.load(top_ptr + row * blocks + block, mask=block < blocks, other=float("-inf")), 0).to(tl.float64)


@triton.jit
def sample_mass_kernel(
    logits_ptr, top_ptr, temperature_ptr, mass_ptr, vocab, blocks, PADDED_BLOCKS: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    logits = tl.load(logits_ptr + row * vocab + token, mask=token < vocab, other=float("-inf")).to(tl.float64)
    tempered = (logits - largest_of(top_ptr, row, blocks, PADDED_BLOCKS)) / tl.load(temperature_ptr + row)
    tl.store(mass_ptr + row * vocab + token, tl.exp(tempered), mask=token < vocab)


@triton.jit
def sample_narrow_kernel(
    logits_ptr, mass_ptr, limit_ptr, floor_ptr, prefix_ptr, partial_ptr, rows, vocab, blocks, step, shift,
    BY_MASS: tl.constexpr, COUNT: tl.constexpr, ID_BITS: tl.constexpr, PADDED_BLOCKS: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    digit = tl.arange(0, 16)
    prefix = tl.full([], 0, tl.int64)
    if step > 0:
        other = tl.arange(0, PADDED_BLOCKS)
        at = partial_ptr + ((((step - 1) % 2) * rows + row) * blocks + other[:, None]) * 16 + digit[None, :]
        above = tl.sum(tl.load(at, mask=(other < blocks)[:, None], other=0.0), 0)
        limit = tl.load(limit_ptr + row)
        if BY_MASS:
            limit = limit * tl.sum(tl.where(digit == 15, above, 0.0), 0)
        last = tl.sum(((digit < 15) & (above >= limit)).to(tl.int64), 0)
        prefix = tl.load(prefix_ptr + (step - 1) * rows + row) | (last << (shift + 4))
    if block == 0:
        tl.store(prefix_ptr + step * rows + row, prefix)
    if COUNT:
        # column d: tokens above digit d; the last column: all
        bound = tl.where(digit == 15, 0, prefix + ((digit.to(tl.int64) + 1) << shift))
        floor = tl.load(floor_ptr + row)
        sums = tl.zeros([CHUNK, 16], tl.float64)
        first = block * BLOCK
        for start in range(first, tl.minimum(first + BLOCK, vocab), CHUNK):
            token = start + tl.arange(0, CHUNK)
            logits = tl.load(logits_ptr + row * vocab + token, mask=token < vocab, other=float("-inf"))
            order = _order(logits, token, ID_BITS)
            if BY_MASS:  # computed once: the 16 columns of a token lie in 16 threads, each of which would compute it again
                weight = tl.load(mass_ptr + row * vocab + token, mask=token < vocab, other=0.0)
            else:
                weight = tl.full([CHUNK], 1.0, tl.float64)
            weight = tl.where((token < vocab) & (order >= floor), weight, 0.0)
            sums += tl.where(order[:, None] >= bound[None, :], weight[:, None], 0.0)
        tl.store(partial_ptr + (((step % 2) * rows + row) * blocks + block) * 16 + digit, tl.sum(sums, 0))


@triton.jit
def kept(logits, token, floor, lowest, top, temperature, ID_BITS: tl.constexpr):
    """Logits, -inf where a filter excludes the token."""
    kept = (_order(logits, token, ID_BITS) >= floor) & ((logits.to(tl.float64) - top) / temperature >= lowest)
    return tl.where(kept, logits, float("-inf"))


def _least_kept(logits: torch.Tensor, mass: torch.Tensor | None, limit: torch.Tensor, floor: torch.Tensor) -> torch.Tensor:
    """int64 [S]: the least order that is kept. mass: float64 [S, V], or None to count; limit: float64 [S], of the sum above it, as a
    part of the whole where there is mass; floor: int64 [S], the least order that takes part."""
    rows, vocab = logits.shape
    chunks = triton.cdiv(vocab, CHUNK)
    block = CHUNK * min(8, triton.next_power_of_2(triton.cdiv(rows * chunks, 1024)))  # some 1024 programs
    blocks, id_bits = triton.cdiv(vocab, block), max(1, (vocab - 1).bit_length())
    steps = triton.cdiv(32 + id_bits, DIGIT_BITS)
    prefix = torch.empty(steps + 1, rows, dtype=torch.int64, device=logits.device)
    partial = torch.empty(2, rows, blocks, 16, dtype=torch.float64, device=logits.device)
    tensors = (logits, logits if mass is None else mass, limit, floor, prefix, partial)
    for step in range(steps + 1):
        count = step < steps
        sample_narrow_kernel[(rows, blocks if count else 1)](
            *tensors, rows, vocab, blocks, step, (steps - 1 - step) * DIGIT_BITS,
            BY_MASS=mass is not None, COUNT=count, ID_BITS=id_bits, PADDED_BLOCKS=triton.next_power_of_2(blocks), CHUNK=CHUNK,
            BLOCK=block, num_warps=8,
        )  # fmt: skip
    return prefix[steps]


def thresholds(
    logits: torch.Tensor, draws: Draws, histories: Histories | None, block: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(logits, adjusted; least order kept int64 [S]; least logarithm of likelihood over the most likely float64 [S]; largest logit fp32
    [S, blocks] of each `block` tokens)."""
    filters = draws.filters
    if filters is None:
        return logits, draws.seed, draws.temperature, logits  # the last three are of the right types, and not read
    rows, vocab = logits.shape
    blocks = triton.cdiv(vocab, block)
    top = logits.new_empty(rows, blocks)
    adjusted = logits if histories is None else torch.empty_like(logits)
    sample_top_kernel[(rows, blocks)](
        logits, *history_arguments(draws, histories), adjusted, top, vocab, ADJUST=histories is not None, PAIRS=block // 2, num_warps=8
    )
    floor = torch.zeros_like(draws.seed)
    if filters.top_k is not None:
        fewest = torch.where(filters.top_k > 0, filters.top_k.double(), torch.inf)
        floor = _least_kept(adjusted, None, fewest, floor)
    if filters.top_p is not None:
        likely = torch.where(filters.top_p < 1, filters.top_p, torch.inf)
        mass = torch.empty_like(logits, dtype=torch.float64)
        sample_mass_kernel[(rows, triton.cdiv(vocab, CHUNK))](
            adjusted, top, draws.temperature, mass, vocab, blocks, PADDED_BLOCKS=triton.next_power_of_2(blocks), CHUNK=CHUNK, num_warps=4
        )
        floor = torch.maximum(floor, _least_kept(adjusted, mass, likely, floor))
    lowest = torch.full_like(draws.temperature, -torch.inf) if filters.min_p is None else filters.min_p.log()
    return adjusted, floor, lowest, top


AOT = [
    aot(sample_top_kernel, {"num_warps": 8}, ADJUST=True, PAIRS=2048),
    aot(sample_mass_kernel, {"num_warps": 4}, PADDED_BLOCKS=32, CHUNK=CHUNK),
    *(
        aot(sample_narrow_kernel, {"num_warps": 8}, BY_MASS=by_mass, COUNT=True, ID_BITS=17, PADDED_BLOCKS=256, CHUNK=CHUNK, BLOCK=CHUNK)
        for by_mass in (False, True)
    ),
]

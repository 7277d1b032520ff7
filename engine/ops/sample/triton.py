"""sample in one pass over the logits, and more where there are filters (triton_filters.py).

Exact draws need float64 logarithms for V tokens a row, of which one matters. So the score logit / temperature + Gumbel noise is first
computed in fp32 with a bound on its error:

    blocks    a block of tokens: the first token that may have the block's largest score, how many may, bounds on that score
    decide    a row: of the blocks that may hold the largest score, the only candidate; else the float64 scores of those blocks

Two scores nearer than the bound are rare (some 1 in 10,000 draws), and greedy rows have none.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.ops.sample import Draws, Histories
from engine.ops.sample.triton_filters import kept, thresholds
from engine.ops.sample.triton_logits import aot, history_arguments, load_logits
from engine.ops.triton_rounding import INTERPRETED

BLOCK = 4096
"""Tokens of a program."""
BLOCKS_OPTIONS = {"num_warps": 8, "maxnreg": 128}
"""Two programs at a time on a multiprocessor: what only rows with penalties and filters compute would take the registers of one."""
SLACK = 1.0
"""Factor on the error bounds. A test raises it until every token is a candidate."""


@triton.jit
def _words(seed, position, first, PAIRS: tl.constexpr):
    """Two words, uint32, for the even tokens of PAIRS pairs, then for the odd ones: engine/philox.py takes the top 52 bits of both."""
    pair = (first // 2 + tl.arange(0, PAIRS)).to(tl.uint32)
    zero = tl.zeros([PAIRS], tl.uint32)
    return tl.philox(seed, pair, zero + position.to(tl.uint32), zero, zero)


@triton.jit
def _log2(x):
    """Within 2^-22, or 2^-22 of the result outside of (1/2, 2)."""
    if INTERPRETED:
        y = tl.log2(x)
    else:
        y = tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1)
    return y


@triton.jit
def _noise(word, next_word):
    """(-log(-log u) in fp32 with an error under 1e-5 + 1e-6 |result|; whether that is so: if not, the error is under 18). No integer is
    converted: 23 bits become a mantissa, the next 23 another."""
    head = ((word >> 9) | 0x3F800000).to(tl.float32, bitcast=True)
    tail = (((word & 511) << 14) | (next_word >> 18) | 0x3F800000).to(tl.float32, bitcast=True) - 0.999999940395355224609375
    tail *= 1.1920928955078125e-07
    u = (head - 1.0) + tail  # within 2^-47, as 1 - u is
    t = (2.0 - head) - tail
    is_certain = tl.minimum(u, t) >= 1.862645149230957e-09
    u, t = tl.maximum(u, 1.862645149230957e-09), tl.maximum(t, 1.862645149230957e-09)
    near = t * (1 + t * (0.5 + t * (0.33333333 + t * (0.25 + t * 0.2))))  # -log(1 - t) for small t
    return _log2(tl.where(t < 0.0625, near, _log2(u) * -0.6931471805599453)) * -0.6931471805599453, is_certain


@triton.jit
def _exact(logits, word, next_word, largest, temperature):
    bits = (word.to(tl.int64) << 20) | (next_word.to(tl.int64) >> 12)
    u = (bits.to(tl.float64) + 0.5) * 2.220446049250313e-16
    return (logits.to(tl.float64) - largest.to(tl.float64)) / temperature - tl.log(-tl.log(u))


@triton.jit
def _load(logits_ptr, slot_ptr, words_ptr, terms_ptr, row, first, vocab, ADJUST: tl.constexpr, PAIRS: tl.constexpr):
    """Logits of the even and the odd tokens of a block."""
    logits = load_logits(logits_ptr, slot_ptr, words_ptr, terms_ptr, row, first + tl.arange(0, 2 * PAIRS), vocab, ADJUST)
    return tl.split(tl.reshape(logits, [PAIRS, 2]))


@triton.jit
def sample_blocks_kernel(
    logits_ptr, slot_ptr, words_ptr, terms_ptr, temperature_ptr, seed_ptr, position_ptr, largest_ptr, low_ptr, high_ptr, token_ptr,
    count_ptr, floor_ptr, vocab, slack, ADJUST: tl.constexpr, PAIRS: tl.constexpr,
    FILTERED: tl.constexpr, ID_BITS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * (2 * PAIRS)
    even, odd = _load(logits_ptr, slot_ptr, words_ptr, terms_ptr, row, first, vocab, ADJUST, PAIRS)
    token = first + 2 * tl.arange(0, PAIRS)
    both = tl.maximum(even, odd)
    largest = tl.max(both, 0)
    has_nan = tl.max(((even != even) | (odd != odd)).to(tl.int32), 0)
    temperature = tl.load(temperature_ptr + row)
    out = row * tl.num_programs(1) + tl.program_id(1)
    if temperature == 0:
        chosen = tl.min(tl.where(even == largest, token, tl.where(odd == largest, token + 1, vocab)), 0)
        count = 1
        low = 0.0
        high = 0.0
    else:
        if FILTERED:
            floor = tl.load(floor_ptr + row)
            even = kept(even, token, floor, ID_BITS)
            odd = kept(odd, token + 1, floor, ID_BITS)
            both = tl.maximum(even, odd)
        low = float("-inf")
        high = float("-inf")
        count = 0
        chosen = vocab
        if tl.max(both, 0) > float("-inf"):  # else nothing of the block is left
            w0, w1, w2, w3 = _words(tl.load(seed_ptr + row), tl.load(position_ptr + row), first, PAIRS)
            factor = _inverse(temperature)
            even_low, even_high = _bounds((even - largest) * factor, w0, w1, slack)
            odd_low, odd_high = _bounds((odd - largest) * factor, w2, w3, slack)
            low = tl.max(tl.maximum(even_low, odd_low), 0)
            high = tl.max(tl.maximum(even_high, odd_high), 0)
            even_may, odd_may = even_high >= low, odd_high >= low
            count = tl.sum(even_may.to(tl.int32) + odd_may.to(tl.int32), 0)
            chosen = tl.min(tl.where(even_may, token, tl.where(odd_may, token + 1, vocab)), 0)
    tl.store(largest_ptr + out, tl.where(has_nan != 0, float("nan"), largest))
    tl.store(low_ptr + out, low)
    tl.store(high_ptr + out, high)
    tl.store(token_ptr + out, chosen)
    tl.store(count_ptr + out, count)


@triton.jit
def _inverse(temperature):
    return tl.minimum(1.0 / temperature, 1e30).to(tl.float32)


@triton.jit
def _bounds(tempered, word, next_word, slack):
    """Of tempered + noise; tempered is no more than 0, and may be -inf, as both bounds are then."""
    noise, is_certain = _noise(word, next_word)
    error = slack * (2e-5 + 1e-6 * (tl.abs(noise) - tl.maximum(tempered, -1e30)))
    error = tl.where(is_certain, error, error + 18.0)
    return tempered + noise - error, tempered + noise + error


@triton.jit
def sample_decide_kernel(
    logits_ptr, slot_ptr, words_ptr, terms_ptr, temperature_ptr, seed_ptr, position_ptr, largest_ptr, low_ptr, high_ptr, token_ptr,
    count_ptr, floor_ptr, out_ptr, vocab, blocks, slack, ADJUST: tl.constexpr, COUNT: tl.constexpr, PAIRS: tl.constexpr,
    PADDED_BLOCKS: tl.constexpr, FILTERED: tl.constexpr, ID_BITS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, PADDED_BLOCKS)
    real = block < blocks
    at = row * blocks + block
    largest = tl.load(largest_ptr + at, mask=real, other=float("-inf"))
    token = tl.load(token_ptr + at, mask=real, other=0)
    has_nan = tl.max((largest != largest).to(tl.int32), 0)
    top = tl.max(largest, 0)
    temperature = tl.load(temperature_ptr + row)
    if (has_nan != 0) | (tl.abs(top) == float("inf")):
        chosen = (tl.min(token, 0) * 0 - 1).to(tl.int64)
    elif temperature == 0:
        chosen = tl.min(tl.where(largest == top, token, vocab), 0).to(tl.int64)
    else:
        # A block's scores are relative to its own largest logit. One of -inf logits alone has no score.
        shift = tl.where(largest > float("-inf"), (largest - top) * _inverse(temperature), float("-inf"))
        error = slack * 1e-6 * -shift
        low = tl.where(shift > float("-inf"), tl.load(low_ptr + at, mask=real, other=0.0) + shift - error, float("-inf"))
        high = tl.where(shift > float("-inf"), tl.load(high_ptr + at, mask=real, other=0.0) + shift + error, float("-inf"))
        best_low = tl.max(low, 0)
        may = (high >= best_low) & real
        count = tl.sum(tl.where(may, tl.load(count_ptr + at, mask=real, other=0), 0), 0)
        chosen = tl.min(tl.where(may, token, vocab), 0).to(tl.int64)
        if count > 1:
            seed = tl.load(seed_ptr + row)
            position = tl.load(position_ptr + row)
            best = tl.full([], float("-inf"), tl.float64)
            for index in range(blocks):
                if tl.max(tl.where(block == index, may.to(tl.int32), 0), 0) > 0:
                    first = index * (2 * PAIRS)
                    even, odd = _load(logits_ptr, slot_ptr, words_ptr, terms_ptr, row, first, vocab, ADJUST, PAIRS)
                    tokens = first + 2 * tl.arange(0, PAIRS)
                    if FILTERED:
                        floor = tl.load(floor_ptr + row)
                        even = kept(even, tokens, floor, ID_BITS)
                        odd = kept(odd, tokens + 1, floor, ID_BITS)
                    w0, w1, w2, w3 = _words(seed, position, first, PAIRS)
                    even_score = _exact(even, w0, w1, top, temperature)
                    odd_score = _exact(odd, w2, w3, top, temperature)
                    score = tl.max(tl.maximum(even_score, odd_score), 0)
                    candidate = tl.min(tl.where(even_score == score, tokens, tl.where(odd_score == score, tokens + 1, vocab)), 0)
                    chosen = tl.where(score > best, candidate.to(tl.int64), chosen)
                    best = tl.maximum(best, score)
    tl.store(out_ptr + row, chosen)
    if COUNT:
        slot = tl.load(slot_ptr + row)
        if (slot >= 0) & (chosen >= 0):
            word = words_ptr + slot * vocab + chosen
            tl.store(word, tl.load(word) + 1)


def run(logits: torch.Tensor, draws: Draws, histories: Histories | None = None) -> torch.Tensor:
    """As the reference; logits contiguous."""
    rows, vocab = logits.shape
    assert logits.is_contiguous() and logits.dtype == torch.float32, f"{logits.stride()} {logits.dtype}"
    out = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if not rows:
        return out
    blocks = triton.cdiv(vocab, BLOCK)
    largest, low, high = logits.new_empty(3, rows, blocks)
    token, count = torch.empty(2, rows, blocks, dtype=torch.int32, device=logits.device)
    logits, floor = thresholds(logits, draws, histories, BLOCK)
    tensors = (
        logits, *history_arguments(draws, histories), draws.temperature, draws.seed, draws.position, largest, low, high, token, count,
        floor,
    )  # fmt: skip
    constants = {
        "ADJUST": histories is not None and draws.filters is None, "FILTERED": draws.filters is not None, "PAIRS": BLOCK // 2,
        "ID_BITS": max(1, (vocab - 1).bit_length()),
    }  # fmt: skip
    sample_blocks_kernel[(rows, blocks)](*tensors, vocab, SLACK, **constants, **BLOCKS_OPTIONS)
    sample_decide_kernel[(rows,)](
        *tensors, out, vocab, blocks, SLACK, COUNT=histories is not None, PADDED_BLOCKS=triton.next_power_of_2(blocks), **constants,
        num_warps=4,
    )  # fmt: skip
    return out


_SIZES = {"PAIRS": BLOCK // 2, "ID_BITS": 17}
AOT = [
    *(aot(sample_blocks_kernel, BLOCKS_OPTIONS, ADJUST=not filtered, FILTERED=filtered, **_SIZES) for filtered in (False, True)),
    *(
        aot(sample_decide_kernel, {"num_warps": 4}, ADJUST=not filtered, COUNT=True, FILTERED=filtered, PADDED_BLOCKS=32, **_SIZES)
        for filtered in (False, True)
    ),
]

"""sample in one pass over the logits, and more where there are filters; batches with penalties or bias go the reference's way.

Exact draws need float64 logarithms for V tokens a row, of which one matters. So the score logit / temperature + Gumbel noise is first
computed in fp32 with a bound on its error:

    blocks    a block of tokens: the first token that may have the block's largest score, how many may, bounds on that score
    decide    a row: of the blocks that may hold the largest score, the only candidate; else the float64 scores of those blocks

Two scores nearer than the bound are rare (some 1 in 10,000 draws), and greedy rows have none.

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

from engine.ops.sample import Draws, sample

BLOCK = 4096
"""Tokens of a program."""
CHUNK = 512
DIGIT_BITS = 4
SLACK = 1.0
"""Factor on the error bounds. A test raises it until every token is a candidate."""


@triton.jit
def _words(seed, position, first, PAIRS: tl.constexpr):
    """52 random bits, int64, for the even and the odd tokens of PAIRS pairs, as engine/philox.py draws them."""
    pair = (first // 2 + tl.arange(0, PAIRS)).to(tl.uint32)
    zero = tl.zeros([PAIRS], tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, pair, zero + position.to(tl.uint32), zero, zero)
    return (w0.to(tl.int64) << 20) | (w1.to(tl.int64) >> 12), (w2.to(tl.int64) << 20) | (w3.to(tl.int64) >> 12)


@triton.jit
def _noise(bits):
    """-log(-log u), u = (bits + 1/2) / 2^52, in fp32 with an error under 1e-5 + 1e-6 |result|."""
    u = (2 * bits + 1).to(tl.float32) * 1.1102230246251565e-16
    t = ((1 << 53) - (2 * bits + 1)).to(tl.float32) * 1.1102230246251565e-16
    near = t * (1 + t * (0.5 + t * (0.33333333 + t * (0.25 + t * (0.2 + t * 0.16666667)))))  # -log(1 - t) for small t
    return -tl.log(tl.where(t < 0.0625, near, -tl.log(u)))


@triton.jit
def _exact(logits, bits, largest, temperature):
    u = (bits.to(tl.float64) + 0.5) * 2.220446049250313e-16
    return (logits.to(tl.float64) - largest.to(tl.float64)) / temperature - tl.log(-tl.log(u))


@triton.jit
def _load(logits_ptr, row, first, vocab, PAIRS: tl.constexpr):
    """Logits of the even and the odd tokens of a block; -inf past the end."""
    token = first + tl.arange(0, 2 * PAIRS)
    logits = tl.load(logits_ptr + row * vocab + token, mask=token < vocab, other=float("-inf"))
    return tl.split(tl.reshape(logits, [PAIRS, 2]))


@triton.jit
def _order(logits, token, ID_BITS: tl.constexpr):
    bits = (logits + 0.0).to(tl.int32, bitcast=True)  # -0 becomes 0
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return ((key.to(tl.int64) + 2147483648) << ID_BITS) | ((1 << ID_BITS) - 1 - token)


@triton.jit
def sample_mass_kernel(logits_ptr, top_ptr, temperature_ptr, mass_ptr, vocab, CHUNK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    logits = tl.load(logits_ptr + row * vocab + token, mask=token < vocab, other=float("-inf")).to(tl.float64)
    tempered = (logits - tl.load(top_ptr + row).to(tl.float64)) / tl.load(temperature_ptr + row)
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
def _kept(logits, token, floor, lowest, top, temperature, ID_BITS: tl.constexpr):
    """Logits, -inf where a filter excludes the token."""
    kept = (_order(logits, token, ID_BITS) >= floor) & ((logits.to(tl.float64) - top) / temperature >= lowest)
    return tl.where(kept, logits, float("-inf"))


@triton.jit
def sample_blocks_kernel(
    logits_ptr, temperature_ptr, seed_ptr, position_ptr, largest_ptr, low_ptr, high_ptr, token_ptr, count_ptr, floor_ptr, lowest_ptr,
    top_ptr, vocab, slack, PAIRS: tl.constexpr, FILTERED: tl.constexpr, ID_BITS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * (2 * PAIRS)
    even, odd = _load(logits_ptr, row, first, vocab, PAIRS)
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
            lowest = tl.load(lowest_ptr + row)
            top = tl.load(top_ptr + row).to(tl.float64)
            even = _kept(even, token, floor, lowest, top, temperature, ID_BITS)
            odd = _kept(odd, token + 1, floor, lowest, top, temperature, ID_BITS)
        even_bits, odd_bits = _words(tl.load(seed_ptr + row), tl.load(position_ptr + row), first, PAIRS)
        factor = _inverse(temperature)
        even_low, even_high = _bounds((even - largest) * factor, _noise(even_bits), slack)
        odd_low, odd_high = _bounds((odd - largest) * factor, _noise(odd_bits), slack)
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
def _bounds(tempered, noise, slack):
    """Of their sum; tempered is no more than 0, and may be -inf."""
    error = slack * (2e-5 + 1e-6 * (tl.abs(noise) - tempered))
    possible = tempered > float("-inf")
    return tl.where(possible, tempered + noise - error, float("-inf")), tl.where(possible, tempered + noise + error, float("-inf"))


@triton.jit
def sample_decide_kernel(
    logits_ptr, temperature_ptr, seed_ptr, position_ptr, largest_ptr, low_ptr, high_ptr, token_ptr, count_ptr, floor_ptr, lowest_ptr,
    out_ptr, vocab, blocks, slack, PAIRS: tl.constexpr, PADDED_BLOCKS: tl.constexpr, FILTERED: tl.constexpr, ID_BITS: tl.constexpr,
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
                    even, odd = _load(logits_ptr, row, first, vocab, PAIRS)
                    tokens = first + 2 * tl.arange(0, PAIRS)
                    if FILTERED:
                        floor = tl.load(floor_ptr + row)
                        lowest = tl.load(lowest_ptr + row)
                        even = _kept(even, tokens, floor, lowest, top.to(tl.float64), temperature, ID_BITS)
                        odd = _kept(odd, tokens + 1, floor, lowest, top.to(tl.float64), temperature, ID_BITS)
                    even_bits, odd_bits = _words(seed, position, first, PAIRS)
                    even_score = _exact(even, even_bits, top, temperature)
                    odd_score = _exact(odd, odd_bits, top, temperature)
                    score = tl.max(tl.maximum(even_score, odd_score), 0)
                    candidate = tl.min(tl.where(even_score == score, tokens, tl.where(odd_score == score, tokens + 1, vocab)), 0)
                    chosen = tl.where(score > best, candidate.to(tl.int64), chosen)
                    best = tl.maximum(best, score)
    tl.store(out_ptr + row, chosen)


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


def _thresholds(logits: torch.Tensor, draws: Draws) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(least order kept int64 [S], least logarithm of likelihood over the most likely float64 [S], largest logit fp32 [S])."""
    filters = draws.filters
    if filters is None:
        return draws.seed, draws.temperature, logits  # of the right types, not read
    top = logits.amax(1)
    floor = torch.zeros_like(draws.seed)
    if filters.top_k is not None:
        fewest = torch.where(filters.top_k > 0, filters.top_k.double(), torch.inf)
        floor = _least_kept(logits, None, fewest, floor)
    if filters.top_p is not None:
        likely = torch.where(filters.top_p < 1, filters.top_p, torch.inf)
        mass = torch.empty_like(logits, dtype=torch.float64)
        grid = (len(logits), triton.cdiv(logits.shape[1], CHUNK))
        sample_mass_kernel[grid](logits, top, draws.temperature, mass, logits.shape[1], CHUNK=CHUNK, num_warps=4)
        floor = torch.maximum(floor, _least_kept(logits, mass, likely, floor))
    lowest = torch.full_like(draws.temperature, -torch.inf) if filters.min_p is None else filters.min_p.log()
    return floor, lowest, top


def run(logits: torch.Tensor, draws: Draws) -> torch.Tensor:
    """As the reference; logits contiguous."""
    if draws.penalties is not None or draws.bias is not None:
        return sample(logits, draws)
    rows, vocab = logits.shape
    assert logits.is_contiguous() and logits.dtype == torch.float32, f"{logits.stride()} {logits.dtype}"
    out = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if not rows:
        return out
    floor, lowest, top = _thresholds(logits, draws)
    blocks = triton.cdiv(vocab, BLOCK)
    largest, low, high = logits.new_empty(3, rows, blocks)
    token, count = torch.empty(2, rows, blocks, dtype=torch.int32, device=logits.device)
    inputs = (logits, draws.temperature, draws.seed, draws.position, largest, low, high, token, count, floor, lowest)
    constants = {"PAIRS": BLOCK // 2, "FILTERED": draws.filters is not None, "ID_BITS": max(1, (vocab - 1).bit_length())}
    sample_blocks_kernel[(rows, blocks)](*inputs, top, vocab, SLACK, **constants, num_warps=8)
    sample_decide_kernel[(rows,)](
        *inputs, out, vocab, blocks, SLACK, **constants, PADDED_BLOCKS=triton.next_power_of_2(blocks), num_warps=4
    )
    return out


_TYPES = dict.fromkeys(("logits_ptr", "largest_ptr", "low_ptr", "high_ptr", "top_ptr"), "*fp32")
_TYPES |= dict.fromkeys(("token_ptr", "count_ptr"), "*i32") | dict.fromkeys(
    ("temperature_ptr", "lowest_ptr", "limit_ptr", "partial_ptr", "mass_ptr"), "*fp64"
)
_TYPES |= dict.fromkeys(("seed_ptr", "position_ptr", "floor_ptr", "prefix_ptr", "out_ptr"), "*i64") | {"vocab": "i32:16", "slack": "fp32"}
_TYPES |= dict.fromkeys(("rows", "blocks", "step", "shift"), "i32")


def _aot(kernel: triton.JITFunction, num_warps: int, **changed: object) -> tuple[object, ...]:
    values = {"PAIRS": BLOCK // 2, "PADDED_BLOCKS": 32, "ID_BITS": 17, "CHUNK": CHUNK, "BLOCK": BLOCK} | changed
    constants = {name: value for name, value in values.items() if name in kernel.arg_names}
    return kernel, {name: _TYPES[name] for name in kernel.arg_names if name not in constants}, constants, {"num_warps": num_warps}


AOT = [
    *(_aot(sample_blocks_kernel, 8, FILTERED=filtered) for filtered in (False, True)),
    _aot(sample_decide_kernel, 4, FILTERED=True),
    _aot(sample_mass_kernel, 4),
    *(_aot(sample_narrow_kernel, 8, BY_MASS=by_mass, COUNT=True, PADDED_BLOCKS=256, BLOCK=CHUNK) for by_mass in (False, True)),
]

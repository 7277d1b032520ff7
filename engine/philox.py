"""Philox4x32-10, a counter-based generator: the same numbers on every device, for any batch, in any order.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), section 4.3; `triton.language.randint4x`
is the same function. Words are 32 bits, held in int64 tensors; products are taken in halves, so that nothing overflows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

_MASK = 2**32 - 1
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10

Words = tuple[torch.Tensor, ...]


def philox(counter: Words, key: Words) -> Words:
    """Four words from four words of counter and two of key: int64 tensors in [0, 2^32) that broadcast together."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK, (k1 + _KEY_STEPS[1]) & _MASK
    return c0, c1, c2, c3


def _multiply(a: torch.Tensor, m: int) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low word of a * m."""
    by_low, by_high = a * (m & 0xFFFF), a * (m >> 16)
    return (by_high + (by_low >> 16)) >> 16, (by_low + ((by_high & 0xFFFF) << 16)) & _MASK


def uniforms(seeds: Sequence[int], positions: Sequence[int], count: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """`uniforms_of` for Python integers; seeds in [0, 2^64)."""
    signed = [seed - 2**64 if seed >= 2**63 else seed for seed in seeds]
    ints = [torch.tensor(values, dtype=torch.int64, device=device) for values in (signed, list(positions))]
    return uniforms_of(ints[0], ints[1], count)


def uniforms_of(seeds: torch.Tensor, positions: torch.Tensor, count: int) -> torch.Tensor:
    """float64 [R, count] in (0, 1): row r, column v depends on (seeds[r], positions[r], v) alone. seeds, positions: int64 [R].

    Key: the two words of the 64-bit seed. Counter: (v // 2, position, 0, 0). Columns 2i and 2i + 1 take words (0, 1) and (2, 3) of
    the result: x = its top 52 bits, u = (x + 1/2) / 2^52, which float64 holds exactly.
    """
    low, high = (seeds & _MASK)[:, None], ((seeds >> 32) & _MASK)[:, None]
    zero = torch.zeros((), dtype=torch.int64, device=seeds.device)
    pairs = torch.arange(-(-count // 2), device=seeds.device)[None]
    words = philox((pairs, positions[:, None], zero, zero), (low, high))
    even, odd = ((words[i] << 20) | (words[i + 1] >> 12) for i in (0, 2))
    bits = torch.stack((even, odd), dim=2).flatten(1)[:, :count]
    return (bits.double() + 0.5) * 2.0**-52

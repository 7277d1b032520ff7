"""Logits with bias and penalties, computed where they are read, in float64 as the reference does it. A row without them pays for a look at
its slot."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.ops.sample import BIAS_SHIFT, COUNT_MASK, NUM_TERMS, SEEN, Draws, Histories

_COUNT, _KNOWN, _SHIFT, _TERMS = (tl.constexpr(value) for value in (COUNT_MASK, COUNT_MASK | SEEN, BIAS_SHIFT, NUM_TERMS))


@triton.jit
def load_logits(logits_ptr, slot_ptr, words_ptr, terms_ptr, row, token, vocab, ADJUST: tl.constexpr):
    """Of some tokens; -inf past the end."""
    logits = tl.load(logits_ptr + row * vocab + token, mask=token < vocab, other=float("-inf"))
    if ADJUST:
        slot = tl.load(slot_ptr + row)
        if slot >= 0:
            word = tl.load(words_ptr + slot * vocab + token, mask=token < vocab, other=0)
            terms = terms_ptr + slot * _TERMS
            count = word & _COUNT
            bias = (word >> _SHIFT) & 0x7FF
            value = logits.to(tl.float64) + tl.load(terms + 2 + bias, mask=bias > 0, other=0.0)
            repetition = tl.load(terms + 2)
            repeated = tl.where(value > 0, value / repetition, value * repetition)
            value = tl.where((word & _KNOWN) > 0, repeated, value)
            # Chosen between rather than multiplied by 0: no product is summed directly, which the compiler would round once, not twice.
            presence = tl.where(count > 0, tl.load(terms), 0.0)
            value -= presence + tl.where(count > 0, tl.load(terms + 1) * count.to(tl.float64), 0.0)
            value = tl.minimum(tl.maximum(value, -3.4028234663852886e38), 3.4028234663852886e38)
            logits = tl.where((word != 0) & (tl.abs(logits) < float("inf")), value.to(tl.float32), logits)
    return logits


def history_arguments(draws: Draws, histories: Histories | None) -> tuple[torch.Tensor, ...]:
    """slot, words, terms; some of the right types, not to be read, where there are none."""
    if histories is None:
        return draws.position, draws.position.view(torch.int32), draws.temperature
    assert draws.slot is not None and histories.words.is_contiguous() and histories.terms.is_contiguous()
    return draws.slot, histories.words, histories.terms


_TYPES = dict.fromkeys(("logits_ptr", "adjusted_ptr", "largest_ptr", "low_ptr", "high_ptr", "top_ptr"), "*fp32")
_TYPES |= dict.fromkeys(("token_ptr", "count_ptr", "words_ptr", "bound_ptr", "length_ptr", "mass_ptr"), "*i32")
_TYPES |= dict.fromkeys(("temperature_ptr", "terms_ptr", "top_p_ptr", "min_p_ptr"), "*fp64")
_TYPES |= dict.fromkeys(("seed_ptr", "position_ptr", "floor_ptr", "out_ptr", "slot_ptr", "top_k_ptr", "sums_ptr", "order_ptr"), "*i64")
_TYPES |= {"vocab": "i32:16", "slack": "fp32"} | dict.fromkeys(("rows", "blocks", "tops"), "i32")


def aot(kernel: triton.JITFunction, options: dict[str, int], **constants: object) -> tuple[object, ...]:
    """A line of AOT (tests/unit/engine/test_aot.py)."""
    return kernel, {name: _TYPES[name] for name in kernel.arg_names if name not in constants}, constants, options

"""Logits to tokens without the host: `engine.sampler.sample` for parameters that are tensors on the device.

What a batch asks for decides which tensors there are, so a step's shape is known when it is captured: a batch without filters is one
pass over the logits, any other takes some more. Penalties and logit bias are read from memory that belongs to the sequence's slot, where
the token drawn is counted, too. Nothing here waits for the device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from core.request import MAX_LOGIT_BIAS
from engine.ops import requires
from engine.ops.registry import Impl, Op
from engine.philox import uniforms_of


@dataclass(frozen=True, slots=True)
class Filters:
    """Each None if no sequence of the batch wants it."""

    top_k: torch.Tensor | None
    """int64 [S]; 0 keeps all."""
    top_p: torch.Tensor | None
    """float64 [S]."""
    min_p: torch.Tensor | None
    """float64 [S]."""


COUNT_MASK = (1 << 20) - 1
SEEN = 1 << 20
BIAS_SHIFT = 21
NUM_TERMS = 3 + MAX_LOGIT_BIAS
LOG2_E = 1.4426950408889634
POWER_TERMS = (1 << 30, 744258157, 257898519, 59395848, 9908897, 1024387)
"""2^-x for x in [0, 1) to 6e-8, times 2^30: t0 - x (t1 - x (t2 - ...))."""


@dataclass(frozen=True, slots=True)
class Histories:
    """Penalties, logit bias and what they depend on, by slot. The memory lasts: only what sequences with such parameters hold is read."""

    words: torch.Tensor
    """int32 [slots, V], contiguous: how often each token occurs in the output so far (20 bits), SEEN if it occurs in the prompt, and from
    BIAS_SHIFT on the number of its bias, from 1 on; 0: none."""
    terms: torch.Tensor
    """float64 [slots, NUM_TERMS], contiguous: penalties for presence, frequency and repetition, then the biases."""


@dataclass(frozen=True, slots=True)
class Draws:
    """SamplingParams and history of S sequences, as the meaning of each field there says."""

    temperature: torch.Tensor
    """float64 [S]; 0 is greedy."""
    seed: torch.Tensor
    """int64 [S], the 64 bits of the seed."""
    position: torch.Tensor
    """int64 [S]: of the token to be drawn."""
    filters: Filters | None = None
    slot: torch.Tensor | None = None
    """int64 [S]: whose history is the sequence's, all different; -1: it has neither penalties nor bias. None: nobody has."""


def sample(logits: torch.Tensor, draws: Draws, histories: Histories | None = None) -> torch.Tensor:
    """logits: fp32 [S, V], not changed. Returns int64 [S], the tokens that `engine.sampler.sample` gives, and -1 for a row whose largest
    logit is not a finite number. `histories`: there if `draws.slot` is; the tokens are counted in its words."""
    greedy = draws.temperature == 0
    adjusted = logits if draws.slot is None or histories is None else _adjusted(logits, draws.slot, histories)
    values = adjusted.double()
    temperature = torch.where(greedy, 1.0, draws.temperature)[:, None]
    tempered = (values - values.amax(dim=1, keepdim=True)) / temperature
    if draws.filters is not None:
        tempered = _filtered(tempered, adjusted, temperature, draws.filters)
    noise = -torch.log(-torch.log(uniforms_of(draws.seed, draws.position, logits.shape[1])))
    tokens = torch.where(greedy[:, None], values, tempered + noise).argmax(dim=1)
    tokens = torch.where(logits.amax(dim=1).isfinite(), tokens, -1)
    if draws.slot is not None and histories is not None:
        is_counted = (draws.slot >= 0) & (tokens >= 0)
        places = torch.where(is_counted, draws.slot * logits.shape[1] + tokens, 0)
        histories.words.view(-1).index_add_(0, places, is_counted.int())
    return tokens


def as_logits(values: torch.Tensor) -> torch.Tensor:
    """float64 -> fp32, nearest; what is beyond fp32's range becomes its end."""
    most = torch.finfo(torch.float32).max
    return values.clamp(-most, most).float()


def _adjusted(logits: torch.Tensor, slot: torch.Tensor, histories: Histories) -> torch.Tensor:
    words, terms = (of_slots[slot.clamp(min=0)] for of_slots in (histories.words, histories.terms))
    presence, frequency, repetition = (terms[:, column : column + 1] for column in range(3))
    counts, bias = words & COUNT_MASK, (words >> BIAS_SHIFT) & 0x7FF
    values = logits.double() + torch.where(bias > 0, terms.gather(1, (2 + bias).long()), 0.0)
    repeated = torch.where(values > 0, values / repetition, values * repetition)
    values = torch.where((words & (SEEN | COUNT_MASK)) > 0, repeated, values)
    values = values - (presence * (counts > 0) + frequency * counts)
    return torch.where((slot >= 0)[:, None] & (words != 0) & logits.isfinite(), as_logits(values), logits)


def masses(logits: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    """int64 [S, V]: what top-p sums up, how likely each token is, 2^30 for the most likely; 0 where less than 2^-31 of that. logits: fp32
    [S, V]; temperature: float64 [S, 1], not 0. Integers and single fp32 operations, so that every device and every order of summation
    gives the same: within 2^-31 and some 1e-6 of itself, the mass is 2^30 * e^((logit - largest) / temperature)."""
    inverse = (1.0 / temperature).clamp(max=1e30).float()
    halvings = (logits.amax(dim=1, keepdim=True) - logits) * inverse * LOG2_E
    is_likely = halvings < 31.0
    fixed = (torch.where(is_likely, halvings, 0.0) * 2.0**24).long()
    whole, part = fixed >> 24, fixed & (2**24 - 1)
    power = torch.zeros_like(part)
    for term in reversed(POWER_TERMS):
        power = term - ((part * power) >> 24)
    return torch.where(is_likely, (power + ((1 << whole) >> 1)) >> whole, 0)


def _filtered(tempered: torch.Tensor, logits: torch.Tensor, temperature: torch.Tensor, filters: Filters) -> torch.Tensor:
    """What top-k, top-p within it and min-p exclude becomes -inf; the most likely token always stays. logits: as penalties left them."""
    kept = tempered
    if filters.top_k is not None or filters.top_p is not None:
        place = torch.arange(tempered.shape[1], device=tempered.device)
        values, ids = torch.sort(logits, dim=1, descending=True, stable=True)
        excluded = torch.zeros_like(ids, dtype=torch.bool)
        if filters.top_k is not None:
            top_k = filters.top_k[:, None]
            excluded = (place >= top_k) & (top_k > 0)
        if filters.top_p is not None:
            top_p = filters.top_p[:, None]
            parts = masses(values, temperature).masked_fill(excluded, 0)
            before, total = parts.cumsum(dim=1) - parts, parts.sum(dim=1, keepdim=True)
            excluded = excluded | ((before.double() >= top_p * total.double()) & (top_p < 1.0) & (place > 0))
        kept = tempered.masked_fill(torch.empty_like(excluded).scatter_(1, ids, excluded), -math.inf)
    if filters.min_p is not None:
        kept = kept.masked_fill(tempered < torch.log(filters.min_p)[:, None], -math.inf)
    return kept


OP = Op("sample", sample, backends={"triton": Impl("engine.ops.sample.triton", requires.triton)})

"""Logits to tokens without the host: `engine.sampler.sample` for parameters that are tensors on the device.

What a batch asks for decides which tensors there are, so a step's shape is known when it is captured: a batch without filters,
penalties and bias is one pass over the logits, any other may sort. Nothing here waits for the device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

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


@dataclass(frozen=True, slots=True)
class Penalties:
    presence: torch.Tensor
    """float64 [S]."""
    frequency: torch.Tensor
    """float64 [S]."""
    repetition: torch.Tensor
    """float64 [S]."""
    counts: torch.Tensor
    """int32 [S, V]: occurrences of each token in the output so far."""
    seen: torch.Tensor
    """bool [S, V]: whether it occurs in prompt or output."""

    def add(self, tokens: torch.Tensor) -> None:
        """Take in one more output token of each sequence, int64 [S]."""
        self.counts.scatter_add_(1, tokens[:, None], torch.ones_like(tokens, dtype=torch.int32)[:, None])
        self.seen.scatter_(1, tokens[:, None], True)


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
    penalties: Penalties | None = None
    bias: torch.Tensor | None = None
    """float64 [S, V], added to the logits."""


def sample(logits: torch.Tensor, draws: Draws) -> torch.Tensor:
    """logits: fp32 [S, V], not changed. Returns int64 [S], the tokens that `engine.sampler.sample` gives, and -1 for a row whose largest
    logit is not a finite number."""
    greedy = draws.temperature == 0
    values = logits.double()
    if draws.bias is not None:
        values = values + draws.bias
    if draws.penalties is not None:
        values = _penalised(values, draws.penalties)
    temperature = torch.where(greedy, 1.0, draws.temperature)[:, None]
    tempered = (values - values.amax(dim=1, keepdim=True)) / temperature
    if draws.filters is not None:
        tempered = _filtered(tempered, draws.filters)
    noise = -torch.log(-torch.log(uniforms_of(draws.seed, draws.position, logits.shape[1])))
    tokens = torch.where(greedy[:, None], values, tempered + noise).argmax(dim=1)
    return torch.where(logits.amax(dim=1).isfinite(), tokens, -1)


def _penalised(values: torch.Tensor, penalties: Penalties) -> torch.Tensor:
    repetition = penalties.repetition[:, None]
    repeated = torch.where(values > 0, values / repetition, values * repetition)
    values = torch.where(penalties.seen, repeated, values)
    return values - (penalties.presence[:, None] * (penalties.counts > 0) + penalties.frequency[:, None] * penalties.counts)


def _filtered(tempered: torch.Tensor, filters: Filters) -> torch.Tensor:
    """What top-k, top-p within it and min-p exclude becomes -inf; the most likely token always stays."""
    kept = tempered
    if filters.top_k is not None or filters.top_p is not None:
        place = torch.arange(tempered.shape[1], device=tempered.device)
        values, ids = torch.sort(tempered, dim=1, descending=True, stable=True)
        if filters.top_k is not None:
            top_k = filters.top_k[:, None]
            values = values.masked_fill((place >= top_k) & (top_k > 0), -math.inf)
        if filters.top_p is not None:
            top_p = filters.top_p[:, None]
            probabilities = torch.softmax(values, dim=1)
            before = probabilities.cumsum(dim=1) - probabilities
            values = values.masked_fill((before >= top_p) & (top_p < 1.0) & (place > 0), -math.inf)
        kept = torch.empty_like(values).scatter_(1, ids, values)
    if filters.min_p is not None:
        kept = kept.masked_fill(tempered < torch.log(filters.min_p)[:, None], -math.inf)
    return kept


OP = Op("sample", sample, backends={"triton": Impl("engine.ops.sample.triton", requires.triton)})

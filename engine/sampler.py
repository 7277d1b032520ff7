"""Logits to tokens.

The draw for the token at absolute position p of a sequence depends only on its logits, its parameters, its history and
u = uniform(seed, p), never on the batch or on earlier draws: so a sequence goes on with the same tokens on another worker.

Order: logit bias, penalties, temperature, top-k, top-p, min-p, then the first token (most likely first, lowest id on ties) at
which the cumulative probability exceeds u.
"""

from __future__ import annotations

import numpy as np
import torch

from core.request import SamplingParams, TokenLogprobs
from engine.sequence import Sequence


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) with 53 random bits: Philox 4x64-10 with key (seed, 0) and counter (position, 0, 0, 0)."""
    raw = np.random.Philox(key=[seed & (2**64 - 1), 0], counter=[position, 0, 0, 0]).random_raw()
    return float(int(raw) >> 11) * 2.0**-53


def sample(logits: torch.Tensor, sequences: list[Sequence]) -> list[int]:
    """logits: fp32 [S, V], for the token after each sequence's last. Returns one token id a sequence."""
    if not sequences:
        return []
    greedy = logits.max(dim=1, keepdim=True).values == logits
    first = greedy.int().argmax(dim=1).tolist()  # argmax of 0/1 values: torch returns the first maximum
    return [
        first[i] if _is_plain_greedy(sequence.request.sampling) else _sample_one(logits[i], sequence)
        for i, sequence in enumerate(sequences)
    ]


def _is_plain_greedy(params: SamplingParams) -> bool:
    return params.is_greedy and not params.logit_bias and not _has_penalties(params)


def _has_penalties(params: SamplingParams) -> bool:
    return bool(params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1.0)


def _sample_one(logits_V: torch.Tensor, sequence: Sequence) -> int:
    params = sequence.request.sampling
    logits = logits_V.double().cpu()
    for token, bias in params.logit_bias:
        logits[token] += bias
    if _has_penalties(params):
        logits = _penalise(logits, sequence, params)
    # Stable descending order: of equal logits the lower id comes first.
    values, ids = torch.sort(logits, descending=True, stable=True)
    if params.is_greedy:
        return int(ids[0])
    probabilities = filtered_probabilities(values / params.temperature, params)
    threshold = uniform(params.seed, len(sequence.token_ids))
    cumulative = probabilities.cumsum(0)
    place = int(torch.searchsorted(cumulative, threshold * float(cumulative[-1]), right=True))
    return int(ids[min(place, len(probabilities) - 1)])


def _penalise(logits: torch.Tensor, sequence: Sequence, params: SamplingParams) -> torch.Tensor:
    size = len(logits)
    counts = torch.bincount(torch.tensor(sequence.token_ids[sequence.request.prompt_len :], dtype=torch.int64), minlength=size)
    seen = torch.zeros(size, dtype=torch.bool)
    seen[sequence.token_ids] = True
    scaled = torch.where(logits > 0, logits / params.repetition_penalty, logits * params.repetition_penalty)
    logits = torch.where(seen, scaled, logits)
    return logits - params.presence_penalty * (counts > 0) - params.frequency_penalty * counts


def filtered_probabilities(descending: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """float64 tempered logits in descending order -> probabilities of the tokens that top-k, top-p and min-p leave (a prefix of the
    order, at least one), not normalised again."""
    probabilities = torch.softmax(descending, dim=0)
    keep = len(probabilities)
    if params.top_k:
        keep = min(keep, params.top_k)
    if params.top_p < 1.0:
        # top-p counts within what top-k left
        within = probabilities[:keep] / probabilities[:keep].sum()
        keep = min(keep, int(torch.searchsorted(within.cumsum(0), params.top_p)) + 1)
    if params.min_p > 0.0:
        keep = min(keep, int((probabilities >= params.min_p * probabilities[0]).sum()))
    return probabilities[: max(keep, 1)]


def logprobs_of(logits: torch.Tensor, targets: list[int], num_top: int) -> tuple[TokenLogprobs, ...]:
    """Log-probabilities of the untempered distribution. logits: fp32 [n, V]; targets: n token ids; `num_top` alternatives each, most
    likely first, lowest id on ties."""
    if not targets:
        return ()
    logs = torch.log_softmax(logits.double(), dim=1).cpu()
    chosen = logs.gather(1, torch.tensor(targets)[:, None])[:, 0].tolist()
    values, ids = torch.sort(logs, dim=1, descending=True, stable=True)
    tops = (values[:, :num_top].tolist(), ids[:, :num_top].tolist())
    return tuple(TokenLogprobs(logprob=chosen[i], top_ids=tuple(tops[1][i]), top_logprobs=tuple(tops[0][i])) for i in range(len(targets)))

"""Logits to tokens.

The draw for the token at absolute position p of a sequence depends only on its logits, its parameters, its history and on
(seed, p), never on the batch or on earlier draws: so a sequence goes on with the same tokens on another worker.

Order: logit bias, penalties, temperature, top-k, top-p within what top-k left, min-p; then, among the tokens left, the one with the
largest logit / temperature + Gumbel noise. With noise -log(-log u), u uniform and independent per token, that is an exact draw from
the softmax (Gumbel-max); it needs no sum, and a small change of the logits changes the token with as small a probability. The noise
of token v comes from `philox.uniforms`(seed, p)[v]. All is computed in float64, but what bias and penalties make of a logit is rounded to
fp32, as logits are, and top-p sums likelihoods in fixed point (`engine.ops.sample.masses`). Ties go to the lowest id everywhere.
"""

from __future__ import annotations

import math

import torch

from core.request import SamplingParams
from engine.ops.sample import as_logits, masses
from engine.philox import uniforms
from engine.sequence import Sequence

ROWS_AT_ONCE = 16
"""A row takes some twenty times what its logits do while its token is chosen: 10 MB with a vocabulary of 129,280. On a GPU that must fit
into the margin of what `workspace.py` measures, however many sequences a step has."""


def needs_history(params: SamplingParams) -> bool:
    """Whether a token depends on those before it by more than the logits, or on tables as wide as the vocabulary."""
    return bool(params.logit_bias) or _has_penalties(params)


def has_filters(params: SamplingParams) -> bool:
    return not params.is_greedy and (params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0)


def signed(seed: int) -> int:
    """The 64 bits of a seed as int64 holds them."""
    return seed - 2**64 if seed >= 2**63 else seed


def sample(logits: torch.Tensor, sequences: list[Sequence], fed: list[int] | None = None) -> list[int]:
    """logits: fp32 [S, V], for the tokens that follow; not changed. `fed`: of each sequence a token that it takes in and does not have
    yet, -1: none. Returns one token id a sequence; -1 where the largest logit is not a finite number."""
    if not sequences:
        return []
    tokens: list[int] = logits.argmax(dim=1).tolist()  # the first maximum, or the first NaN
    tops = logits.gather(1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0]
    tokens = [token if math.isfinite(top) else -1 for token, top in zip(tokens, tops.tolist(), strict=True)]
    rest = [row for row, s in enumerate(sequences) if tokens[row] >= 0 and not _is_plain_greedy(s.request.sampling)]
    for start in range(0, len(rest), ROWS_AT_ONCE):
        some = rest[start : start + ROWS_AT_ONCE]
        newest = [-1 if fed is None else fed[row] for row in some]
        chosen = _choose(logits[some].double(), [sequences[row] for row in some], newest)
        for row, token in zip(some, chosen, strict=True):
            tokens[row] = token
    return tokens


def _is_plain_greedy(params: SamplingParams) -> bool:
    return params.is_greedy and not needs_history(params)


def _has_penalties(params: SamplingParams) -> bool:
    return bool(params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1.0)


def _choose(logits: torch.Tensor, sequences: list[Sequence], newest: list[int]) -> list[int]:
    """logits: float64 [R, V], overwritten; newest: -1 or a token after those of the sequence."""
    for row, sequence in enumerate(sequences):
        if needs_history(sequence.request.sampling):
            logits[row] = _adjusted(logits[row], sequence, newest[row])
    drawn = [row for row, sequence in enumerate(sequences) if not sequence.request.sampling.is_greedy]
    if drawn:
        params = [sequences[row].request.sampling for row in drawn]
        positions = [len(sequences[row].token_ids) + (newest[row] >= 0) for row in drawn]
        tempered = temper(logits[drawn], params)
        keep_only_likely(tempered, logits[drawn].float(), params)
        u = uniforms([p.seed for p in params], positions, logits.shape[1], logits.device)
        logits[drawn] = tempered - torch.log(-torch.log(u))
    chosen: list[int] = logits.argmax(dim=1).tolist()
    return chosen


def _adjusted(logits_V: torch.Tensor, sequence: Sequence, newest: int) -> torch.Tensor:
    """float64 [V] with bias and penalties, rounded to fp32; what was no finite number stays as it is."""
    params, prompt_len = sequence.request.sampling, sequence.request.prompt_len
    token_ids = [*sequence.token_ids, newest] if newest >= 0 else sequence.token_ids
    values = logits_V.clone()
    if params.logit_bias:
        ids, biases = zip(*params.logit_bias, strict=True)
        values += torch.zeros_like(values).index_add_(0, torch.tensor(ids, device=values.device), values.new_tensor(biases))
    if params.repetition_penalty != 1.0:
        seen = torch.tensor(sorted(set(token_ids)), device=values.device)
        some = values[seen]
        values[seen] = torch.where(some > 0, some / params.repetition_penalty, some * params.repetition_penalty)
    if params.presence_penalty or params.frequency_penalty:
        output = torch.tensor(token_ids[prompt_len:], dtype=torch.int64, device=values.device)
        counts = torch.bincount(output, minlength=len(values))
        values -= params.presence_penalty * (counts > 0) + params.frequency_penalty * counts
    return torch.where(logits_V.isfinite(), as_logits(values).double(), logits_V)


def temper(logits: torch.Tensor, params: list[SamplingParams]) -> torch.Tensor:
    """float64 [R, V] -> log-probabilities up to a constant: the largest of each row is 0, so no temperature can overflow it."""
    temperatures = logits.new_tensor([p.temperature for p in params])[:, None]
    return (logits - logits.amax(dim=1, keepdim=True)) / temperatures


def keep_only_likely(tempered: torch.Tensor, logits: torch.Tensor, params: list[SamplingParams]) -> None:
    """Set what top-k, top-p and min-p exclude to -inf, in place; the most likely token always stays. logits: fp32, what was tempered."""
    size = tempered.shape[1]
    sorting = [row for row, p in enumerate(params) if 0 < p.top_k < size or p.top_p < 1.0]
    if sorting:
        values, ids = torch.sort(logits[sorting], dim=1, descending=True, stable=True)
        top_k = torch.tensor([params[row].top_k or size for row in sorting], device=tempered.device)[:, None]
        excluded = torch.arange(size, device=tempered.device) >= top_k
        temperatures = tempered.new_tensor([params[row].temperature for row in sorting])[:, None]
        parts = masses(values, temperatures).masked_fill(excluded, 0)
        before, total = parts.cumsum(dim=1) - parts, parts.sum(dim=1, keepdim=True)
        top_p = tempered.new_tensor([params[row].top_p for row in sorting])[:, None]
        excluded[:, 1:] |= ((before.double() >= top_p * total.double()) & (top_p < 1.0))[:, 1:]
        tempered[sorting] = tempered[sorting].masked_fill(torch.empty_like(excluded).scatter_(1, ids, excluded), -math.inf)
    if any(p.min_p > 0 for p in params):
        floors = tempered.new_tensor([math.log(p.min_p) if p.min_p > 0 else -math.inf for p in params])[:, None]
        tempered.masked_fill_(tempered < floors, -math.inf)

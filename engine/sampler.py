"""Logits to tokens.

The draw for the token at absolute position p of a sequence depends only on its logits, its parameters, its history and on
(seed, p), never on the batch or on earlier draws: so a sequence goes on with the same tokens on another worker.

Order: logit bias, penalties, temperature, top-k, top-p within what top-k left, min-p; then, among the tokens left, the one with the
largest logit / temperature + Gumbel noise. With noise -log(-log u), u uniform and independent per token, that is an exact draw from
the softmax (Gumbel-max); it needs no sum, and a small change of the logits changes the token with as small a probability. The noise
of token v comes from `philox.uniforms`(seed, p)[v]. Ties go to the lowest id everywhere.
"""

from __future__ import annotations

import math

import torch

from core.errors import InternalError
from core.request import SamplingParams
from engine.ops.sample import Draws, Filters, Penalties
from engine.philox import uniforms
from engine.sequence import Sequence


def needs_history(params: SamplingParams) -> bool:
    """Whether a token depends on those before it by more than the logits, or on tables as wide as the vocabulary: then the host draws it,
    and must know them."""
    return bool(params.logit_bias) or _has_penalties(params)


def has_filters(params: SamplingParams) -> bool:
    return not params.is_greedy and (params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0)


def signed(seed: int) -> int:
    """The 64 bits of a seed as int64 holds them."""
    return seed - 2**64 if seed >= 2**63 else seed


def sample(logits: torch.Tensor, sequences: list[Sequence], positions: list[int] | None = None) -> list[int]:
    """logits: fp32 [S, V], for the tokens at `positions` of the sequences; not changed. None: for those after each sequence's last, as it
    must be where `needs_history`. Returns one token id a sequence. Raises InternalError naming the requests whose largest logit is not a
    finite number."""
    if not sequences:
        return []
    tokens: list[int] = logits.argmax(dim=1).tolist()  # the first maximum, or the first NaN
    tops = logits.gather(1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0]
    if not bool(tops.isfinite().all()):
        names = [s.request_id for s, top in zip(sequences, tops.tolist(), strict=True) if not math.isfinite(top)]
        raise InternalError(f"the logits of {', '.join(names)} are not finite")
    rest = [row for row, sequence in enumerate(sequences) if not _is_plain_greedy(sequence.request.sampling)]
    if rest:
        places = [len(sequences[row].token_ids) if positions is None else positions[row] for row in rest]
        chosen = _choose(logits[rest].double(), [sequences[row] for row in rest], places)
        for row, token in zip(rest, chosen, strict=True):
            tokens[row] = token
    return tokens


def draws_of(sequences: list[Sequence], vocab_size: int, device: torch.device | str) -> Draws:
    """What the op `sample` needs to give each sequence the token that `sample` here gives it."""
    params = [sequence.request.sampling for sequence in sequences]

    def column(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64, device=device)

    def whole(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    penalties = bias = None
    drawn = [p for p in params if not p.is_greedy]
    top_k = whole([p.top_k for p in params]) if any(p.top_k for p in drawn) else None
    top_p = column([p.top_p for p in params]) if any(p.top_p < 1.0 for p in drawn) else None
    min_p = column([p.min_p for p in params]) if any(p.min_p > 0 for p in drawn) else None
    if any(_has_penalties(p) for p in params):
        counts = torch.zeros(len(params), vocab_size, dtype=torch.int32)
        seen = torch.zeros(len(params), vocab_size, dtype=torch.bool)
        for row, sequence in enumerate(sequences):
            seen[row, sequence.token_ids] = True
            counts[row] = torch.bincount(torch.tensor(sequence.token_ids[sequence.request.prompt_len :]), minlength=vocab_size)
        penalties = Penalties(
            column([p.presence_penalty for p in params]),
            column([p.frequency_penalty for p in params]),
            column([p.repetition_penalty for p in params]),
            counts.to(device),
            seen.to(device),
        )
    if any(p.logit_bias for p in params):
        bias = torch.zeros(len(params), vocab_size, dtype=torch.float64)
        for row, p in enumerate(params):
            _add_bias(bias[row], p)
        bias = bias.to(device)
    return Draws(
        column([p.temperature for p in params]),
        whole([signed(p.seed) for p in params]),
        whole([len(sequence.token_ids) for sequence in sequences]),
        None if top_k is top_p is min_p is None else Filters(top_k, top_p, min_p),
        penalties,
        bias,
    )


def _is_plain_greedy(params: SamplingParams) -> bool:
    return params.is_greedy and not needs_history(params)


def _has_penalties(params: SamplingParams) -> bool:
    return bool(params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1.0)


def _choose(logits: torch.Tensor, sequences: list[Sequence], positions: list[int]) -> list[int]:
    """logits: float64 [R, V], overwritten."""
    for row, sequence in enumerate(sequences):
        _add_bias(logits[row], sequence.request.sampling)
        _penalise(logits[row], sequence)
    drawn = [row for row, sequence in enumerate(sequences) if not sequence.request.sampling.is_greedy]
    if drawn:
        params = [sequences[row].request.sampling for row in drawn]
        tempered = temper(logits[drawn], params)
        keep_only_likely(tempered, params)
        u = uniforms([p.seed for p in params], [positions[row] for row in drawn], logits.shape[1], logits.device)
        logits[drawn] = tempered - torch.log(-torch.log(u))
    chosen: list[int] = logits.argmax(dim=1).tolist()
    return chosen


def _add_bias(logits_V: torch.Tensor, params: SamplingParams) -> None:
    if params.logit_bias:
        ids, values = zip(*params.logit_bias, strict=True)
        logits_V.index_add_(0, torch.tensor(ids, device=logits_V.device), logits_V.new_tensor(values))


def _penalise(logits_V: torch.Tensor, sequence: Sequence) -> None:
    params = sequence.request.sampling
    if not _has_penalties(params):
        return
    history = torch.tensor(sequence.token_ids, device=logits_V.device)
    if params.repetition_penalty != 1.0:
        seen = torch.tensor(sorted(set(sequence.token_ids)), device=logits_V.device)
        values = logits_V[seen]
        logits_V[seen] = torch.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
    counts = torch.bincount(history[sequence.request.prompt_len :], minlength=len(logits_V))
    logits_V -= params.presence_penalty * (counts > 0) + params.frequency_penalty * counts


def temper(logits: torch.Tensor, params: list[SamplingParams]) -> torch.Tensor:
    """float64 [R, V] -> log-probabilities up to a constant: the largest of each row is 0, so no temperature can overflow it."""
    temperatures = logits.new_tensor([p.temperature for p in params])[:, None]
    return (logits - logits.amax(dim=1, keepdim=True)) / temperatures


def keep_only_likely(tempered: torch.Tensor, params: list[SamplingParams]) -> None:
    """Set what top-k, top-p and min-p exclude to -inf, in place; the most likely token always stays."""
    size = tempered.shape[1]
    sorting = [row for row, p in enumerate(params) if 0 < p.top_k < size or p.top_p < 1.0]
    if sorting:
        values, ids = torch.sort(tempered[sorting], dim=1, descending=True, stable=True)
        top_k = torch.tensor([params[row].top_k or size for row in sorting], device=tempered.device)[:, None]
        values.masked_fill_(torch.arange(size, device=tempered.device) >= top_k, -math.inf)
        probabilities = torch.softmax(values, dim=1)
        before = probabilities.cumsum(dim=1) - probabilities
        top_p = tempered.new_tensor([params[row].top_p for row in sorting])[:, None]
        values[:, 1:].masked_fill_((before >= top_p)[:, 1:] & (top_p < 1.0), -math.inf)
        tempered[sorting] = torch.empty_like(values).scatter_(1, ids, values)
    if any(p.min_p > 0 for p in params):
        floors = tempered.new_tensor([math.log(p.min_p) if p.min_p > 0 else -math.inf for p in params])[:, None]
        tempered.masked_fill_(tempered < floors, -math.inf)

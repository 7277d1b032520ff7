"""Log-probabilities of the model's own distribution: before temperature, penalties, bias and filters."""

from __future__ import annotations

import math

import torch

from core.request import TokenLogprobs

ROWS_AT_ONCE = 64
"""A row takes four times what its logits do while it is reduced."""


def logprobs_of(logits: torch.Tensor, targets: list[int], num_top: int) -> tuple[TokenLogprobs, ...]:
    """logits: fp32 [n, V]; targets: n token ids. Each result has `num_top` alternatives, most likely first, lowest id on ties;
    reduced in float64, ROWS_AT_ONCE rows at a time."""
    found: list[TokenLogprobs] = []
    for start in range(0, len(targets), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        found += logprobs_from(*logprob_tensors(logits[rows], torch.tensor(targets[rows], device=logits.device), num_top))
    return tuple(found)


def logprob_tensors(logits: torch.Tensor, targets: torch.Tensor, num_top: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same as tensors: of the targets, int64 [n], float64 [n]; ids and logarithms of the alternatives, int64 and float64
    [num_top, n]."""
    logs = torch.log_softmax(logits.double(), dim=1)
    chosen = logs.gather(1, targets[:, None])[:, 0]
    # Repeated argmax, unlike topk, says which of equals it takes: the first. It writes over logs, which nobody needs any more.
    num_top = min(num_top, logs.shape[1])
    top_ids = torch.empty(num_top, len(targets), dtype=torch.int64, device=logits.device)
    top_logprobs = torch.empty(num_top, len(targets), dtype=torch.float64, device=logits.device)
    for place in range(num_top):
        torch.max(logs, dim=1, out=(top_logprobs[place], top_ids[place]))
        logs.scatter_(1, top_ids[place][:, None], -math.inf)
    return chosen, top_ids, top_logprobs


def logprobs_from(chosen: torch.Tensor, top_ids: torch.Tensor, top_logprobs: torch.Tensor) -> tuple[TokenLogprobs, ...]:
    """From what `logprob_tensors` gives."""
    ids, values = top_ids.T.tolist(), top_logprobs.T.tolist()
    return tuple(
        TokenLogprobs(logprob=one, top_ids=tuple(ids[row]), top_logprobs=tuple(values[row])) for row, one in enumerate(chosen.tolist())
    )

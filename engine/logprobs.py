"""Log-probabilities of the model's own distribution: before temperature, penalties, bias and filters."""

from __future__ import annotations

import math

import torch

from core.request import TokenLogprobs


def logprobs_of(logits: torch.Tensor, targets: list[int], num_top: int) -> tuple[TokenLogprobs, ...]:
    """logits: fp32 [n, V]; targets: n token ids. Each result has `num_top` alternatives, most likely first, lowest id on ties;
    reduced in float64."""
    if not targets:
        return ()
    logs = torch.log_softmax(logits.double(), dim=1)
    chosen = logs.gather(1, torch.tensor(targets, device=logits.device)[:, None])[:, 0].tolist()
    # Repeated argmax, unlike topk, says which of equals it takes: the first. It writes over logs, which nobody needs any more.
    top_ids, top_logprobs = [], []
    for _ in range(min(num_top, logs.shape[1])):
        values, ids = logs.max(dim=1)
        top_ids.append(ids.tolist())
        top_logprobs.append(values.tolist())
        logs.scatter_(1, ids[:, None], -math.inf)
    return tuple(
        TokenLogprobs(logprob=chosen[row], top_ids=tuple(ids[row] for ids in top_ids), top_logprobs=tuple(v[row] for v in top_logprobs))
        for row in range(len(targets))
    )

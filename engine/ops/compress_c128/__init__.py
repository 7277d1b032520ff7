"""Ratio-128 compression, online: running maximum, sum and weighted sum per channel (architecture section 3, spec 2.3)."""

from __future__ import annotations

import torch

from engine.ops.registry import Op

BLOCK = 128


def compress_c128(
    kv: torch.Tensor, score: torch.Tensor, state: torch.Tensor, first: torch.Tensor, count: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advance S open blocks by some tokens each, strictly token by token, so that the result does not depend on how a prompt was cut.

    kv, score: fp32 [S, n, D], left-aligned tokens of each block (scores include ape). state: fp32 [S, 3, D] (maximum, sum, weighted
    sum) before them; first: int64 [S], the place (0..127) in its block of each one's first token: 0 starts from the neutral state.
    count: int64 [S] tokens given, 1..n, first + count <= 128. Returns (state after them fp32 [S, 3, D], entries fp32 [S, D] = weighted
    sum / sum, meaningful where first + count == 128).
    """
    neutral = torch.finfo(torch.float32).min
    fresh = (first == 0)[:, None]
    top = torch.where(fresh, neutral, state[:, 0]).double()
    total = torch.where(fresh, 0.0, state[:, 1]).double()
    weighted = torch.where(fresh, 0.0, state[:, 2]).double()
    for step in range(int(count.max()) if len(count) else 0):
        active = (step < count)[:, None]
        value, new = kv[:, step].double(), score[:, step].double()
        higher = torch.maximum(top, new)
        keep, add = torch.exp(top - higher), torch.exp(new - higher)
        # Rounded to float32 after every token, as the state is stored: a block cut anywhere goes through the same values.
        total = torch.where(active, (total * keep + add).float().double(), total)
        weighted = torch.where(active, (weighted * keep + add * value).float().double(), weighted)
        top = torch.where(active, higher, top)
    return torch.stack((top, total, weighted), dim=1).float(), (weighted / total).float()


OP = Op("compress_c128", compress_c128)

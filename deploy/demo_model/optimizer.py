"""Muon for matrices, AdamW for the rest: fewer steps until recall forms than with AdamW alone. All state lives on the device, so that
a step can be captured in a CUDA graph.
"""

from __future__ import annotations

import torch
from torch import Tensor

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic iteration of K. Jordan's Muon."""


def orthogonalise(updates: Tensor, steps: int = 5) -> Tensor:
    """[G, m, n] -> about U V^T of each matrix, by Newton-Schulz iteration in bf16."""
    a, b, c = _NEWTON_SCHULZ
    x = updates.bfloat16()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon:
    """Momentum, then an orthogonalised update of each matrix [m, n] or stack of matrices [E, m, n]."""

    def __init__(self, parameters: list[Tensor], *, momentum: float = 0.95, weight_decay: float = 0.0) -> None:
        self._momentum, self._weight_decay = momentum, weight_decay
        self._groups: list[tuple[list[Tensor], Tensor]] = []
        for shape in sorted({tuple(p.shape[-2:]) for p in parameters}):
            members = [p for p in parameters if tuple(p.shape[-2:]) == shape]
            count = sum(p.numel() // (shape[0] * shape[1]) for p in members)
            self._groups.append((members, torch.zeros(count, *shape, device=members[0].device)))

    @torch.no_grad()
    def step(self, rate: Tensor) -> None:
        """`rate`: learning rate, a scalar tensor on the device."""
        for members, momentum in self._groups:
            rows, columns = momentum.shape[1:]
            gradient = torch.cat([p.grad.reshape(-1, rows, columns) for p in members if p.grad is not None])
            momentum.lerp_(gradient, 1 - self._momentum)
            update = orthogonalise(gradient.lerp(momentum, self._momentum)) * max(1.0, rows / columns) ** 0.5
            start = 0
            for parameter in members:
                count = parameter.numel() // (rows * columns)
                part = update[start : start + count].view_as(parameter).float()
                parameter.mul_(1 - rate * self._weight_decay).sub_(rate * part)
                start += count

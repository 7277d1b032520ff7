"""A small layer of routed experts, and tokens for it; the same in every process."""

from __future__ import annotations

import torch

from engine.config import EngineConfig
from engine.model.quantized import quantize_mxfp4
from engine.ops.moe_experts import PackedExperts, pack
from engine.ops.registry import BoundOps, bind
from engine.parallel.expert_placement import balanced_placement

HIDDEN, INNER, EXPERTS, TOP_K, LIMIT = 128, 64, 8, 3, 10.0


def packed(experts: tuple[int, ...]) -> PackedExperts:
    def draw(expert: int, which: int, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(100 * expert + which)) / shape[-1] ** 0.5

    w1, w2, w3 = (
        [quantize_mxfp4(draw(expert, which, *shape)) for expert in experts]
        for which, shape in enumerate(((INNER, HIDDEN), (HIDDEN, INNER), (INNER, HIDDEN)))
    )
    return pack(list(w1), list(w2), list(w3), True)


def tokens_of(rank: int, count: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(count, HIDDEN, generator=generator).to(dtype)
    ids = torch.rand(count, EXPERTS, generator=generator).argsort(1)[:, :TOP_K].contiguous()
    return x, ids, torch.rand(count, TOP_K, generator=generator)


def positions_of(x: torch.Tensor) -> torch.Tensor:
    """Of rows that are tokens, all of them."""
    return torch.arange(len(x))


def reference_ops() -> BoundOps:
    return bind(EngineConfig(device="cpu"), torch.device("cpu"))


SKEWED = balanced_placement([100, 1, 1, 50, 1, 1, 1, 1], 4, 3)

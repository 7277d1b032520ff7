"""exchange_pack: one token, fillers, experts with several copies, rows of Flash (4,096 channels) and Pro (7,168)."""

from __future__ import annotations

import torch

from engine.ops.cases import Bench, Case, Draw, generator, randn
from engine.parallel.expert_placement import SlotChoice, balanced_placement, even_placement

REASON = "bits are moved"
TOP_K = 6


def draw_tokens(tokens: int, width: int, experts: int, redundant: int = 0, dtype: torch.dtype = torch.bfloat16, top_k: int = TOP_K) -> Draw:
    """On rank 1 of four, or of two; every fifth row is a filler."""

    def draw(device: torch.device, seed: int) -> tuple[object, ...]:
        if redundant:
            load = [float(1 + expert % 7) for expert in range(experts)]
            choice = SlotChoice(balanced_placement(load, 4, (experts + redundant) // 4), 1, device)
        else:
            choice = SlotChoice(even_placement(experts, 2), 1, device)
        choice.load += 5
        ids = torch.rand(tokens, experts, generator=generator(device, seed), device=device).argsort(1)[:, :top_k].contiguous()
        row = torch.arange(tokens, device=device)
        positions = torch.where(row % 5 == 4, -1, row * 31)
        weights = randn(device, seed + 2, tokens, top_k)
        return randn(device, seed + 1, tokens, width, dtype=dtype), ids, weights, positions, choice.table, choice.turns, choice.load

    return draw


def _case(name: str, draw: Draw, small: bool = False) -> Case:
    return Case(name, draw, 0.0, REASON, small, written=(6,))


CASES = (
    _case("no tokens", draw_tokens(0, 64, 8), small=True),
    _case("one token", draw_tokens(1, 64, 8), small=True),
    _case("fillers and copies", draw_tokens(13, 96, 8, redundant=4), small=True),
    _case("odd sizes in fp32", draw_tokens(7, 33, 9, top_k=5, redundant=3, dtype=torch.float32), small=True),
    _case("Flash", draw_tokens(1, 4096, 256)),
    _case("Flash batch with copies", draw_tokens(131, 4096, 256, redundant=32)),
    _case("Pro batch", draw_tokens(256, 7168, 384)),
)


def _bench(tokens: int, width: int, experts: int) -> Bench:
    num_bytes = tokens * (2 * width * 2 + TOP_K * (8 + 4 + 8 + 8 + 4 + 4))
    return Bench(f"T={tokens} d={width}", draw_tokens(tokens, width, experts), num_bytes)


BENCH = (_bench(1, 4096, 256), _bench(32, 4096, 256), _bench(128, 4096, 256), _bench(128, 7168, 384))

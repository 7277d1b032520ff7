"""exchange_slots_fp8: no tokens, one, fillers, experts with several copies; Flash (4,096 channels) and Pro (7,168)."""

from __future__ import annotations

import torch

from engine.ops.cases import Bench, Case, Draw
from engine.ops.exchange_pack.cases import TOP_K, draw_tokens

REASON = "quantised as the reference does"


def _draw(tokens: int, width: int, experts: int, redundant: int = 0, top_k: int = TOP_K) -> Draw:
    def draw(device: torch.device, seed: int) -> tuple[object, ...]:
        x, ids, _, *others = draw_tokens(tokens, width, experts, redundant, top_k=top_k)(device, seed)
        return x, ids, *others

    return draw


def _case(name: str, draw: Draw, small: bool = False) -> Case:
    return Case(name, draw, 0.0, REASON, small, written=(5,))


CASES = (
    _case("no tokens", _draw(0, 128, 8), small=True),
    _case("one token", _draw(1, 128, 8), small=True),
    _case("fillers and copies", _draw(13, 384, 8, redundant=4), small=True),
    _case("odd sizes", _draw(7, 256, 9, redundant=3, top_k=5), small=True),
    _case("Flash prompt with copies", _draw(1031, 4096, 256, redundant=32)),
    _case("Pro prompt", _draw(512, 7168, 384)),
)


def _bench(tokens: int, width: int, experts: int) -> Bench:
    num_bytes = tokens * (3 * width + width // 32 + TOP_K * (8 + 8 + 8 + 8))
    return Bench(f"T={tokens} d={width}", _draw(tokens, width, experts), num_bytes)


BENCH = (_bench(4096, 4096, 256), _bench(4096, 7168, 384))

"""exchange_slots: the tokens of exchange_pack, without their values."""

from __future__ import annotations

import torch

from engine.ops.cases import Bench, Case, Draw
from engine.ops.exchange_pack.cases import TOP_K
from engine.ops.exchange_pack.cases import draw_tokens as _tokens

REASON = "integers"


def _draw(tokens: int, experts: int, redundant: int = 0, top_k: int = TOP_K) -> Draw:
    def draw(device: torch.device, seed: int) -> tuple[object, ...]:
        _, ids, _, positions, *choice = _tokens(tokens, 2, experts, redundant, top_k=top_k)(device, seed)
        return ids, positions, *choice

    return draw


def _case(name: str, draw: Draw, small: bool = False) -> Case:
    return Case(name, draw, 0.0, REASON, small, written=(4,))


CASES = (
    _case("no tokens", _draw(0, 8), small=True),
    _case("one token", _draw(1, 8), small=True),
    _case("fillers and copies", _draw(13, 8, redundant=4), small=True),
    _case("odd sizes", _draw(7, 9, redundant=3, top_k=5), small=True),
    _case("Flash batch with copies", _draw(131, 256, redundant=32)),
    _case("Pro batch", _draw(256, 384)),
)
BENCH = tuple(Bench(f"T={tokens}", _draw(tokens, 256), tokens * TOP_K * 40) for tokens in (1, 32, 128))

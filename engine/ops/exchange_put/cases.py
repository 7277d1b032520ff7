"""exchange_put: no rows, rows without a place, a buffer whose rows lie apart; Flash (4,096 channels) and Pro (7,168)."""

from __future__ import annotations

import torch

from engine.ops.cases import Bench, Case, Draw, generator, randn

REASON = "moved"


def _draw(experts: int, room: int, width: int, rows: int, gap: int = 0) -> Draw:
    """To places of their own; every fifth row has none. `gap`: channels between two rows of the buffer."""

    def draw(device: torch.device, seed: int) -> tuple[object, ...]:
        places = torch.randperm(experts * room, generator=generator(device, seed), device=device)[:rows]
        places[4::5] = -1
        buffer = torch.full((experts, room, width + gap), 7.0, dtype=torch.bfloat16, device=device)[:, :, :width]
        return randn(device, seed + 1, rows, width, dtype=torch.bfloat16), places, buffer

    return draw


def _case(name: str, draw: Draw, small: bool = False) -> Case:
    return Case(name, draw, 0.0, REASON, small, written=(2,))


CASES = (
    _case("no rows", _draw(2, 4, 128, 0), small=True),
    _case("one row", _draw(2, 4, 128, 1), small=True),
    _case("rows that lie apart", _draw(3, 8, 96, 11, gap=16), small=True),
    _case("Flash", _draw(16, 64, 4096, 384, gap=64)),
    _case("Pro", _draw(12, 128, 7168, 768, gap=112)),
)


def _bench(width: int, rows: int) -> Bench:
    return Bench(f"R={rows} d={width}", _draw(16, 128, width, rows), rows * width * 4)


BENCH = (_bench(4096, 12), _bench(4096, 384), _bench(4096, 1536), _bench(7168, 768))

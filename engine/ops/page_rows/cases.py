"""page_rows: entries that top-k chose, in no order, with unused places, of sequences with pages in random order."""

from __future__ import annotations

import torch

from engine.ops.cases import Bench, Case, Draw, generator
from engine.ops.paged_cases import places_of

REASON = "integers"


def _draw(lengths: tuple[int, ...], count: int, per_page: int = 64, fillers: int = 0) -> Draw:
    """One token behind each of `lengths` tokens, with up to `count` entries of those that it sees."""

    def draw(device: torch.device, seed: int) -> tuple[object, ...]:
        places, _, _ = places_of(device, seed, [(length, 1) for length in lengths], fillers)
        visible = (places.positions_T + 1) // (256 // per_page)
        drawn = torch.rand(len(visible), count, generator=generator(device, seed + 1), device=device) * visible[:, None]
        unused = torch.arange(count, device=device) >= visible[:, None]
        return torch.where(unused, -1, drawn.long()).int(), places, per_page

    return draw


CASES = (
    Case("no tokens", _draw((), 8), 0.0, REASON, small=True),
    Case("no entries", _draw((3, 5), 0), 0.0, REASON, small=True),
    Case("fillers and short ones", _draw((0, 3, 40, 900), 24, fillers=2), 0.0, REASON, small=True),
    Case("two rows a page", _draw((200, 3000), 20, per_page=2), 0.0, REASON, small=True),
    Case("Flash", _draw((1_000_000,), 512), 0.0, REASON),
    Case("Pro batch", _draw(tuple(range(0, 40_000, 400)), 1024, fillers=3), 0.0, REASON),
)


def _bench(tokens: int, count: int) -> Bench:
    return Bench(f"T={tokens} K={count}", _draw((100_000,) * tokens, count), tokens * count * 12)


BENCH = (_bench(1, 512), _bench(32, 512), _bench(128, 512), _bench(128, 1024))

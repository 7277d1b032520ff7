"""Selections of V4-Flash (512 of up to 262,144 entries) and V4-Pro (1,024), rows of all lengths in one batch, ties and hostile orders."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from engine.ops.cases import Bench, Case, Draw, generator, randn

LONGEST = 262_144
REASON = "indices: the same set, so the tolerance is not used"


def same_sets(outputs: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> None:
    (chosen,), (wanted,) = outputs, expected
    assert chosen.shape == wanted.shape and chosen.dtype == wanted.dtype, f"{chosen.dtype} {chosen.shape}"
    different = (chosen.sort(dim=1).values != wanted.sort(dim=1).values).any(1)
    assert not different.any(), f"rows {different.nonzero()[:, 0].tolist()[:8]} differ"


def _lengths(device: torch.device, seed: int, rows: int, most: int, least: int = 0) -> torch.Tensor:
    """int64 [rows], `most` among them, and the shortest if there are two."""
    lengths = torch.randint(least, most + 1, (rows,), generator=generator(device, seed), device=device)
    lengths[:1] = most
    lengths[1:2] = least
    return lengths


def _normal(rows: int, entries: int, k: int, least: int | None = None) -> Draw:
    def draw(device: torch.device, seed: int) -> tuple[object, ...]:
        lengths = _lengths(device, seed + 1, rows, entries, entries if least is None else least)
        return randn(device, seed, rows, entries), lengths, k

    return draw


def _of(make: Callable[[torch.device, int, int, int], torch.Tensor], rows: int, entries: int, k: int) -> Draw:
    def draw(device: torch.device, seed: int) -> tuple[object, ...]:
        return make(device, seed, rows, entries), _lengths(device, seed + 1, rows, entries), k

    return draw


def _few_values(device: torch.device, seed: int, rows: int, entries: int) -> torch.Tensor:
    """Ties everywhere, both zeros and -inf among them."""
    values = torch.tensor([-torch.inf, -1.0, -0.0, 0.0, 0.0, 1.0], device=device)
    return values[torch.randint(0, len(values), (rows, entries), generator=generator(device, seed), device=device)]


def _equal(device: torch.device, seed: int, rows: int, entries: int) -> torch.Tensor:
    return torch.full((rows, entries), -2.5, device=device)


def _ascending(device: torch.device, seed: int, rows: int, entries: int) -> torch.Tensor:
    """The best ones share groups."""
    return randn(device, seed, rows, entries).sort(dim=1).values


def _close(device: torch.device, seed: int, rows: int, entries: int) -> torch.Tensor:
    """Keys that differ in their last bits only, one far above."""
    scores = 1.0 + torch.randint(0, 64, (rows, entries), generator=generator(device, seed), device=device) * 2.0**-23
    scores[:, entries // 2] = 1e30
    return scores


def _strided(rows: int, entries: int, k: int) -> Draw:
    """Rows that are not aligned to 16 bytes, inside a wider tensor whose rest would win."""

    def draw(device: torch.device, seed: int) -> tuple[object, ...]:
        wide = torch.full((rows, entries + 5), torch.inf, device=device)
        wide[:, 1 : entries + 1] = randn(device, seed, rows, entries)
        return wide[:, 1 : entries + 1], _lengths(device, seed + 1, rows, entries), k

    return draw


def _case(name: str, draw: Draw, small: bool = False) -> Case:
    return Case(name, draw, 0.0, REASON, small, check=same_sets)


CASES = (
    _case("no rows", _normal(0, 100, 16), small=True),
    _case("no entries", _normal(2, 0, 16), small=True),
    _case("k of none", _normal(2, 100, 0), small=True),
    _case("fewer entries than k", _normal(3, 40, 64, least=0), small=True),
    _case("short rows", _normal(4, 1000, 16, least=0), small=True),
    _case("short ties", _of(_few_values, 4, 1000, 16), small=True),
    _case("short equal", _of(_equal, 3, 300, 20), small=True),
    _case("short strided", _strided(3, 333, 7), small=True),
    _case("longer than a block", _normal(2, 9001, 8, least=9), small=True),
    _case("longer ties", _of(_few_values, 3, 8193, 16), small=True),
    _case("Flash mixed", _normal(32, 20_000, 512, least=0)),
    _case("Flash groups fewer than k", _normal(8, 12_000, 512, least=8_193)),
    _case("Flash ties", _of(_few_values, 40, 50_000, 512)),
    _case("Flash equal", _of(_equal, 5, 70_000, 512)),
    _case("Flash ascending", _of(_ascending, 6, 100_001, 512)),
    _case("Flash close", _of(_close, 7, 65_536, 512)),
    _case("Flash strided", _strided(9, 33_333, 512)),
    _case("Flash one query of 1M tokens", _normal(1, LONGEST, 512)),
    _case("Flash 1M tokens", _normal(40, LONGEST, 512, least=0)),
    _case("Flash prefill", _normal(600, 16_384, 512, least=0)),
    _case("Flash 2K tokens", _normal(64, 700, 512, least=0)),
    _case("Pro mixed", _normal(33, 40_000, 1024, least=0)),
    _case("Pro groups fewer than k", _normal(8, 30_000, 1024, least=8_193)),
    _case("Pro ties", _of(_few_values, 20, 60_000, 1024)),
    _case("Pro ascending", _of(_ascending, 4, LONGEST, 1024)),
    _case("Pro close", _of(_close, 3, LONGEST - 1, 1024)),
    _case("Pro 1M tokens", _normal(3, LONGEST, 1024)),
)


def _torch_topk(rows: int, entries: int, k: int) -> Callable[[torch.device, int], Callable[[], object]]:
    def prepare(device: torch.device, seed: int) -> Callable[[], object]:
        logits = randn(device, seed, rows, entries)
        return lambda: torch.topk(logits, k, dim=1, sorted=False)

    return prepare


def _bench(rows: int, entries: int, k: int) -> Bench:
    num_bytes = rows * (entries * 4 + k * 4 + 8)
    baselines = {"torch.topk": _torch_topk(rows, entries, k)}
    return Bench(f"T={rows} S={entries} k={k}", _normal(rows, entries, k), num_bytes, baselines=baselines)


BENCH = tuple(
    _bench(rows, entries, k)
    for rows, entries, k in (
        *((rows, entries, 512) for entries in (2048, 32_768, LONGEST) for rows in (1, 32, 128)),
        (1, LONGEST, 1024),
        (128, LONGEST, 1024),
        (2048, 32_768, 512),
        (8192, 2048, 512),
    )
)

"""Batches of one kind and mixed ones, over the vocabularies of the published models (129,280) and of small ones."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from engine.ops.cases import Bench, Case, Draw, generator, randn
from engine.ops.sample import Draws, Filters, Penalties

VOCAB = 129_280
REASON = "tokens are compared exactly: scores nearer than fp32 can tell are decided in float64"


def _draw(rows: int, vocab: int, temperatures: tuple[float, ...], filtered: str = "", penalised: bool = False) -> Draw:
    """Temperatures of the rows in turn; logits as peaked as a language model's. filtered: of "kpm" for top-k, top-p, min-p."""

    def draw(device: torch.device, seed: int) -> tuple[object, ...]:
        def uniform(index: int) -> torch.Tensor:
            return torch.rand(rows, generator=generator(device, seed + index), dtype=torch.float64, device=device)

        filters, penalties = None, None
        if filtered:
            filters = Filters(
                (uniform(3) * 60).long() if "k" in filtered else None,
                0.5 + uniform(4) if "p" in filtered else None,
                0.02 * uniform(5).round() if "m" in filtered else None,
            )
        if penalised:
            counts = torch.randint(0, 3, (rows, vocab), generator=generator(device, seed + 6), device=device, dtype=torch.int32)
            penalties = Penalties(uniform(7), uniform(8), 0.7 + uniform(9), counts, counts > 0)
        temperature = torch.tensor([temperatures[row % len(temperatures)] for row in range(rows)], dtype=torch.float64, device=device)
        seeds = torch.randint(-(2**62), 2**62, (rows,), generator=generator(device, seed + 1), device=device)
        positions = torch.randint(0, 2**20, (rows,), generator=generator(device, seed + 2), device=device)
        logits = randn(device, seed, rows, vocab, scale=3.0)
        return logits, Draws(temperature, seeds, positions, filters, penalties)

    return draw


def _changed(draw: Draw, change: Callable[[torch.Tensor], None]) -> Draw:
    def changed(device: torch.device, seed: int) -> tuple[object, ...]:
        logits, draws = draw(device, seed)
        change(logits)
        return logits, draws

    return changed


def _ties(logits: torch.Tensor) -> None:
    logits.round_()


def _gaps(logits: torch.Tensor) -> None:
    logits[:, : logits.shape[1] // 2] = -math.inf
    logits[:, -1] = -math.inf


def _broken(logits: torch.Tensor) -> None:
    logits[0, 17], logits[1, 3], logits[2] = math.nan, math.inf, -math.inf


MIXED = (0.0, 1.0, 0.6, 1.7)


def _case(name: str, draw: Draw, small: bool = False) -> Case:
    return Case(name, draw, 0.0, REASON, small)


CASES = (
    _case("no rows", _draw(0, 1024, MIXED), small=True),
    _case("greedy with ties", _changed(_draw(3, 5001, (0.0,)), _ties), small=True),
    _case("mixed", _draw(5, 5000, MIXED), small=True),
    _case("excluded tokens", _changed(_draw(4, 5001, MIXED), _gaps), small=True),
    _case("few filtered", _draw(3, 700, (0.7, 0.0, 1.0), "kpm"), small=True),
    _case("few filtered with ties", _changed(_draw(2, 700, (1.0,), "p"), _ties), small=True),
    _case("not finite", _changed(_draw(4, 1024, MIXED), _broken), small=True),
    _case("cold", _draw(64, VOCAB, (0.01, 1e-6))),
    _case("greedy", _changed(_draw(64, VOCAB, (0.0,)), _ties)),
    _case("drawn", _draw(256, VOCAB, (1.0,))),
    _case("drawn from few values", _changed(_draw(256, VOCAB, MIXED), _ties)),
    _case("filtered", _draw(64, VOCAB, MIXED, "kpm")),
    _case("filtered with ties", _changed(_draw(33, VOCAB, MIXED, "kp"), _ties)),
    _case("filtered alone", _draw(1, VOCAB, (0.8,), "p")),
    _case("min-p", _draw(9, VOCAB, (1.0, 0.0), "m")),
    _case("penalised", _draw(16, VOCAB, MIXED, penalised=True)),
)


def _bench(name: str, rows: int, temperature: float, filtered: str = "") -> Bench:
    return Bench(f"S={rows} {name}", _draw(rows, VOCAB, (temperature,), filtered), rows * VOCAB * 4)


BENCH = (
    *(_bench("greedy", rows, 0.0) for rows in (1, 32, 128)),
    *(_bench("drawn", rows, 1.0) for rows in (1, 32, 128)),
    *(_bench("top-p", rows, 1.0, "p") for rows in (1, 32, 128)),
)

"""Batches of one kind and mixed ones, over the vocabularies of the published models (129,280) and of small ones."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from engine.ops.cases import Bench, Case, Draw, generator, randn
from engine.ops.sample import BIAS_SHIFT, COUNT_MASK, NUM_TERMS, SEEN, Draws, Filters, Histories

VOCAB = 129_280
REASON = "tokens are compared exactly: scores nearer than fp32 can tell are decided in float64"


def _draw(rows: int, vocab: int, temperatures: tuple[float, ...], filtered: str = "", penalised: bool = False) -> Draw:
    """Temperatures of the rows in turn; logits as peaked as a language model's. filtered: of "kpm" for top-k, top-p, min-p. penalised:
    all rows but every third have penalties and biases."""

    def draw(device: torch.device, seed: int) -> tuple[object, ...]:
        def uniform(index: int) -> torch.Tensor:
            return torch.rand(rows, generator=generator(device, seed + index), dtype=torch.float64, device=device)

        filters, slot, histories = None, None, None
        if filtered:
            filters = Filters(
                (uniform(3) * 60).long() if "k" in filtered else None,
                0.5 + uniform(4) if "p" in filtered else None,
                0.02 * uniform(5).round() if "m" in filtered else None,
            )
        if penalised:
            slot = torch.randperm(rows + 3, generator=generator(device, seed + 6), device=device)[:rows]
            slot[2::3] = -1
            histories = _histories(rows + 3, vocab, device, seed + 7)
        temperature = torch.tensor([temperatures[row % len(temperatures)] for row in range(rows)], dtype=torch.float64, device=device)
        seeds = torch.randint(-(2**62), 2**62, (rows,), generator=generator(device, seed + 1), device=device)
        positions = torch.randint(0, 2**20, (rows,), generator=generator(device, seed + 2), device=device)
        logits = randn(device, seed, rows, vocab, scale=3.0)
        return logits, Draws(temperature, seeds, positions, filters, slot), histories

    return draw


def _histories(slots: int, vocab: int, device: torch.device, seed: int) -> Histories:
    """Half of the tokens untouched, the rest of all kinds; the last slot's repetition penalty takes its logits out of fp32's range."""

    def integers(index: int, below: int) -> torch.Tensor:
        return torch.randint(0, below, (slots, vocab), generator=generator(device, seed + index), device=device, dtype=torch.int32)

    counts = torch.where(integers(0, 50) == 0, COUNT_MASK - 1, integers(1, 4))
    words = counts | (integers(2, 2) * SEEN) | (integers(3, 1025) * (integers(4, 3) == 0)) << BIAS_SHIFT
    terms = torch.rand(slots, NUM_TERMS, generator=generator(device, seed + 5), device=device, dtype=torch.float64)
    terms[:, 2] += 0.5
    terms[-1, 2] = 1e-300
    terms[:, 3:] = terms[:, 3:] * 8 - 4
    return Histories(torch.where(integers(6, 2) == 0, words, 0), terms)


def _changed(draw: Draw, change: Callable[[torch.Tensor], None]) -> Draw:
    def changed(device: torch.device, seed: int) -> tuple[object, ...]:
        logits, *rest = draw(device, seed)
        change(logits)
        return logits, *rest

    return changed


def _ties(logits: torch.Tensor) -> None:
    logits.round_()


def _gaps(logits: torch.Tensor) -> None:
    logits[:, : logits.shape[1] // 2] = -math.inf
    logits[:, -1] = -math.inf


def _broken(logits: torch.Tensor) -> None:
    logits[0, 17], logits[1, 3], logits[2] = math.nan, math.inf, -math.inf


MIXED = (0.0, 1.0, 0.6, 1.7)


def _case(name: str, draw: Draw, small: bool = False, written: tuple[int, ...] = ()) -> Case:
    return Case(name, draw, 0.0, REASON, small, written=written)


CASES = (
    _case("no rows", _draw(0, 1024, MIXED), small=True),
    _case("greedy with ties", _changed(_draw(3, 5001, (0.0,)), _ties), small=True),
    _case("mixed", _draw(5, 5000, MIXED), small=True),
    _case("excluded tokens", _changed(_draw(4, 5001, MIXED), _gaps), small=True),
    _case("few filtered", _draw(3, 700, (0.7, 0.0, 1.0), "kpm"), small=True),
    _case("more filtered", _draw(9, 5001, (0.7, 1.0, 2.0), "kpm"), small=True),
    _case("few filtered with ties", _changed(_draw(2, 700, (1.0,), "p"), _ties), small=True),
    _case("not finite", _changed(_draw(4, 1024, MIXED), _broken), small=True),
    _case("few penalised", _draw(7, 5001, MIXED, penalised=True), small=True, written=(2,)),
    _case("few penalised and filtered", _draw(4, 700, MIXED, "kpm", penalised=True), small=True, written=(2,)),
    _case("penalised and not finite", _changed(_draw(4, 1024, MIXED, penalised=True), _broken), small=True, written=(2,)),
    _case("cold", _draw(64, VOCAB, (0.01, 1e-6))),
    _case("greedy", _changed(_draw(64, VOCAB, (0.0,)), _ties)),
    _case("drawn", _draw(256, VOCAB, (1.0,))),
    _case("drawn from few values", _changed(_draw(256, VOCAB, MIXED), _ties)),
    _case("filtered", _draw(64, VOCAB, MIXED, "kpm")),
    _case("filtered with ties", _changed(_draw(33, VOCAB, MIXED, "kp"), _ties)),
    _case("filtered alone", _draw(1, VOCAB, (0.8,), "p")),
    _case("min-p", _draw(9, VOCAB, (1.0, 0.0), "m")),
    _case("penalised", _draw(64, VOCAB, MIXED, penalised=True), written=(2,)),
    _case("penalised and filtered", _draw(33, VOCAB, MIXED, "kpm", penalised=True), written=(2,)),
    _case("penalised with ties", _changed(_draw(64, VOCAB, MIXED, penalised=True), _ties), written=(2,)),
)


def _bench(name: str, rows: int, temperature: float, filtered: str = "", penalised: str = "") -> Bench:
    """penalised: "none" where the step is one that knows penalties, but no row has any; "some": two thirds have."""
    draw = _draw(rows, VOCAB, (temperature,), filtered, bool(penalised))

    def without(device: torch.device, seed: int) -> tuple[object, ...]:
        arguments = draw(device, seed)
        arguments[1].slot.fill_(-1)
        return arguments

    read = rows + rows * 2 // 3 if penalised == "some" else rows
    return Bench(f"S={rows} {name}", without if penalised == "none" else draw, read * VOCAB * 4)


BENCH = (
    *(_bench("greedy", rows, 0.0) for rows in (1, 32, 128)),
    *(_bench("drawn", rows, 1.0) for rows in (1, 32, 128)),
    *(_bench("drawn, none penalised", rows, 1.0, penalised="none") for rows in (1, 32, 128)),
    *(_bench("drawn, penalised", rows, 1.0, penalised="some") for rows in (3, 33, 129)),
    *(_bench("top-p", rows, 1.0, "p") for rows in (1, 32, 128)),
    *(_bench("top-p, none penalised", rows, 1.0, "p", "none") for rows in (1, 32, 128)),
    *(_bench("top-k, top-p, min-p", rows, 1.0, "kpm") for rows in (1, 32, 128)),
)

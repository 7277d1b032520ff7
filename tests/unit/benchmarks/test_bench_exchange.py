"""The benchmark of the exchange on CPU ranks: every backend beside what it calls, the same rows on all ranks."""

from __future__ import annotations

import torch

from engine.parallel.group import Group
from tests.benchmarks.bench_exchange import Load, measure
from tests.support.ranks import run_group

SIZES = {"hidden": 128, "experts": 8, "top_k": 2}
LOADS = [Load(tokens=3, is_decode=True, **SIZES), Load(tokens=20, is_decode=False, **SIZES)]


def rank(group: Group) -> list[dict[str, object]]:
    return list(measure(LOADS, group, torch.device("cpu")))


def test_every_backend_stands_beside_what_it_calls() -> None:
    first, second = run_group(2, rank)
    assert first == second
    assert [(row["mode"], row["what"], row["beside"]) for row in first] == [
        (mode, what, beside)
        for mode in ("decode", "prefill")
        for what, beside in (("collectives", "-"), ("gather", "collectives"), ("reference", "collectives"))
    ]
    assert all(float(str(row["us"])) > 0 for row in first)

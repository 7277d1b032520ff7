"""What a benchmark of a cluster makes of its members' metrics and its requests' times."""

from __future__ import annotations

import argparse
import json
import pathlib

import pytest

from tests.benchmarks import cluster_metrics
from tests.benchmarks.bench_cluster import STAGES, Bench
from tests.benchmarks.bench_serving import Outcome, Workload, summarise
from tests.benchmarks.cluster_metrics import Reading, requests_between, routing_between, waits_between
from tests.benchmarks.cluster_report import plot, report

SKEW = 0.75


def reading(counts: list[int], waited: float, moves: float = 0.0, awaited: float = 0.0) -> Reading:
    tokens = {("layers.0", str(expert)): float(count) for expert, count in enumerate(counts)}
    return Reading(
        {},
        {"decode": tokens | {("mtp.0", "0"): 0.0}},
        {"decode/0.0": waited},
        {"decode/0.0": float(counts[0]), "decode/0.1": float(counts[-1])},
        {"decode": {"layers.0": 1.25}},
        {"decode": moves},
        {"decode": awaited},
    )


def test_routing_is_that_of_the_time_between_two_readings() -> None:
    before, after = reading([100, 0, 0, 0], 1.0), reading([106, 2, 0, 4], 3.0, 2.0)
    layer = {"busiest expert": 6 / 3, "busiest rank": pytest.approx(8 / 6), "as placed": 1.25, "used": 3 / 4}
    assert routing_between(before, after, {"decode": 2}) == {"decode": layer | {"moves": 2.0, "layers": {"layers.0": layer}}}
    assert waits_between(before, after, 10.0) == {"decode/0.0": pytest.approx(0.2)}
    assert requests_between(before, after) == {"decode/0.0": 6.0, "decode/0.1": 4.0}
    assert routing_between(before, before, {"decode": 2}) == {}


def test_rates_are_a_users_and_a_devices() -> None:
    outcomes = [Outcome(0.0, 100, [1.0 + gap * n for n in range(11)], 9.0) for gap in (0.1, 0.2, 0.2)]
    row = summarise("3", [*outcomes, Outcome(0.0, 100, error="x")], 10.0, 1e9, 1e9, num_gpus=2)
    assert row["failed"] == 1 and row["tok/s/user"] == pytest.approx(5.0)
    assert row["out tok/s/GPU"] == pytest.approx(33 / 10 / 2) and row["all tok/s/GPU"] == pytest.approx(333 / 10 / 2)


def options(out: pathlib.Path, routing: str) -> argparse.Namespace:
    file = pathlib.Path(__file__).resolve().parents[3] / "deploy/clusters/h200_flash_1p1d.yaml"
    return argparse.Namespace(out=out, file=file, home=out / "home", routing=routing, tiny=True, skew=SKEW, overrides=["router.port=8123"])


@pytest.mark.parametrize(("routing", "skew", "hashed"), [("scored", 0.0, 2), ("even", 0.0, 4), ("skewed", SKEW, 4)])
def test_a_routing_is_a_choice_of_layers_and_of_skew(tmp_path: pathlib.Path, routing: str, skew: float, hashed: int) -> None:
    bench = Bench(options(tmp_path, routing))
    assert bench.gpus == 4 and bench.spec.router.port == 8123 and bench.spec.engine.load == "dummy"
    assert bench.spec.engine.dummy_skew == skew
    assert json.loads((bench.spec.model_path / "config.json").read_text())["num_hash_layers"] == hashed


def test_a_point_after_experts_have_moved_waits_under_small_loads(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(options(tmp_path, "skewed"))
    found = [reading([1], 0.0, moves, awaited) for moves, awaited in ((0, 0), (0, 3), (2, 1), (3, 0), (3, 1))]
    loads: list[int] = []

    async def run_load(load: Workload, count: int, seed: int, *, concurrency: int) -> None:
        loads.append(load.output_len)

    monkeypatch.setattr(cluster_metrics, "read", lambda folder: found.pop(0))
    monkeypatch.setattr("tests.benchmarks.bench_cluster.run_load", run_load)
    seen = []
    for stage in STAGES:
        bench.wait_for(stage)
        seen.append((len(loads), len(found)))
    assert seen == [(0, 5), (0, 5), (3, 1)]


def test_a_record_becomes_a_page_and_a_plot(tmp_path: pathlib.Path) -> None:
    row = summarise("8 x 4, 1", [Outcome(0.0, 8, [0.5, 0.6, 0.7], 0.7)], 1.0, 1e9, 1e9, num_gpus=4)
    routing = routing_between(reading([0, 0, 0, 0], 0.0), reading([1, 1, 1, 1], 0.5), {"decode": 2})
    point = {"shape": [8, 4], "clients": 1, "row": row, "stages": {"decode": 1.0}, "routing": routing, "waiting": {"decode/0.0": 0.05}}
    point["requests"] = {"decode/0.0": 3.0, "decode/0.1": 1.0, "prefill/0.0": 4.0}
    said = {"command": "x", "commit": "c", "hardware": "h", "date": "d", "file": "f.yaml", "devices": 4, "start s": 1.0}
    page = report(said | {"points": [point]}, "even")
    assert "| 8 x 4, 1 | decode | 1.000 (1.000) | 1.000 (1.000) | 1.250 (1.250) | 0 | 100.0% | 5.0% | 1.50 |" in page
    plot(tmp_path / "even.png", said | {"points": [point]}, "even")
    assert (tmp_path / "even.png").stat().st_size > 1000

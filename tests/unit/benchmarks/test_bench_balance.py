"""The benchmark of balance: its trace is what it says, its steps are the engine's, and rebalancing shows in them."""

from __future__ import annotations

import json
import pathlib
import sys

import pytest
import torch

from engine.parallel.expert_placement import SlotChoice, balanced_placement, even_placement
from tests.benchmarks import bench_balance
from tests.benchmarks.bench_balance import PLACED, Trace, drawn, drifted, placements, report, step_load
from tests.benchmarks.hardware import GB300, WITH_DEEPEP
from tests.benchmarks.scaling_model import work_of


def trace(seed: int = 0, *, skew: float = 1.0, drift: float = 0.0, tokens: int = 4000, windows: int = 3) -> Trace:
    return drawn(
        64, 6, layers=2, windows=windows, tokens=tokens, skew=skew, drift=drift, generator=torch.Generator().manual_seed(seed)
    )  # fmt: skip


@pytest.mark.parametrize("seed", [0, 1])
def test_a_seed_gives_one_trace_and_a_token_different_experts(seed: int) -> None:
    one, same, other = trace(seed), trace(seed), trace(seed + 100)
    assert torch.equal(one.ids[1][2], same.ids[1][2]) and not torch.equal(one.ids[1][2], other.ids[1][2])
    ids = one.ids[0][0].sort(dim=1).values
    assert (ids[:, 1:] != ids[:, :-1]).all()


def test_skew_makes_some_experts_popular_and_no_skew_none() -> None:
    flat, steep = (sorted(trace(skew=skew).load(0, 0)) for skew in (0.0, 1.0))
    assert flat[-1] < 1.3 * flat[0]
    assert steep[-1] > 10 * steep[0]


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_drift_moves_its_share_of_experts(share: float) -> None:
    order = torch.randperm(100, generator=torch.Generator().manual_seed(3))
    after = drifted(order, share, torch.Generator().manual_seed(4))
    assert sorted(after.tolist()) == list(range(100))
    assert int((after != order).sum()) == round(100 * share)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_step_goes_to_the_slots_that_the_engine_chooses(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    placement = balanced_placement([float(one) for one in torch.rand(64, generator=generator) ** 4], 4, 19)
    batch = 50
    ids = torch.rand(4 * batch, 64, generator=generator).topk(6, dim=1).indices
    chosen = torch.cat([SlotChoice(placement, rank)(ids[rank * batch : (rank + 1) * batch]) for rank in range(4)])
    wanted = torch.bincount(chosen.flatten(), minlength=4 * 19).view(4, 19)
    rows, experts = step_load(ids, placement, batch)
    assert torch.equal(rows, wanted.sum(1)) and torch.equal(experts, (wanted > 0).sum(1))
    assert int(rows.sum()) == ids.numel()


@pytest.mark.parametrize("redundant", [0, 1])
def test_placing_by_load_evens_out_a_trace_that_does_not_drift(redundant: int) -> None:
    one = trace(tokens=8000, skew=0.6)
    found = {name: bench_balance.imbalance(one.load(0, 2), chosen[-1]) for name, chosen in placements(one, 0, 8, redundant).items()}
    assert found["as numbered"] > 1.15 > 1.1 > found["each window"]
    assert found["once"] == pytest.approx(found["each window"], abs=0.06)


def test_only_placing_again_follows_a_drift() -> None:
    one = trace(tokens=8000, drift=0.3, windows=6)
    mean = {
        name: sum(bench_balance.imbalance(one.load(0, window), each) for window, each in enumerate(chosen, start=1)) / len(chosen)
        for name, chosen in placements(one, 0, 8, 1).items()
    }
    assert mean["each window"] < mean["once"]


def test_every_rank_holds_as_many_experts_more_as_asked_for() -> None:
    for redundant in (0, 1, 2):
        for chosen in placements(trace(), 0, 16, redundant).values():
            assert [one.slots_per_rank for one in chosen] == [4 + redundant] * 2
    assert placements(trace(), 0, 16, 0)["as numbered"][0] == even_placement(64, 16)


def test_tokens_per_second_follow_the_busiest_rank() -> None:
    work = work_of("v4_flash")
    steep = drawn(256, 6, layers=1, windows=3, tokens=8000, skew=1.0, drift=0.0, generator=torch.Generator().manual_seed(0))
    rows = {row["placed"]: row for row in report(work, GB300, WITH_DEEPEP, steep, 16, 1, 128)}
    assert tuple(rows) == PLACED
    first, last = rows["as numbered"], rows["each window"]
    assert last["window"] < first["window"] and last["step"] < first["step"]
    assert last["decode tokens/s/GPU"] > first["decode tokens/s/GPU"]
    assert last["prefill tokens/s/GPU"] > 1.1 * first["prefill tokens/s/GPU"]
    assert first["decode tokens/s/GPU"] == pytest.approx(128e3 / first["step ms"], rel=0.01)


def test_the_command_prints_a_row_for_each_group(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--ranks", "2,4", "--redundant", "0,1", "--layers", "1", "--windows", "2", "--tokens", "1000", "--batch", "16"]
    monkeypatch.setattr(sys, "argv", ["bench_balance", *arguments, "--out", str(tmp_path / "found.json")])
    bench_balance.main()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ") and not line.startswith("| ranks")]
    assert [line.split("|")[1].strip() for line in lines] == ["2", "2", "4", "4"]
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found["rows"]) == 4 * len(PLACED) and found["options"]["seed"] == 0

"""The scaling model: its counts are those of the specification, it moves the right way, and it is close to what was measured."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import sys

import pytest

from tests.benchmarks import scaling_model
from tests.benchmarks.hardware import AS_MEASURED, GB300, GOAL, H200, HARDWARE, SOFTWARE, WITH_DEEPEP, Hardware, Software
from tests.benchmarks.step_model import Work, decode_parts, experts_s, largest_batch, prefill_parts, touched, touched_of


@functools.cache
def work(name: str) -> Work:
    return scaling_model.work_of(name)


def step(
    name: str = "v4_flash", hardware: Hardware = GB300, software: Software = GOAL, *, ranks: int = 8, batch: float = 32, **more: object
):
    parts = decode_parts(work(name), hardware, software, ranks=ranks, batch=batch, **({"context": 8192} | more))  # type: ignore[arg-type]
    return sum(parts.values())


@pytest.mark.parametrize("described", [*HARDWARE.values(), *SOFTWARE.values()], ids=lambda one: one.name)
def test_every_figure_has_a_source(described: Hardware | Software) -> None:
    figures = {field.name for field in dataclasses.fields(described)} - {"name", "sources"}
    assert set(described.sources) == figures
    assert all(described.sources.values())


@pytest.mark.parametrize(
    ("name", "expert_mb", "streamed_gb", "gflop", "cache_mb"), [("v4_flash", 13.37, 7.76, 26.5, 15.9), ("v4_pro", 35.09, 26.8, 97.7, 31.8)]
)
def test_counts_are_those_of_the_specification(name: str, expert_mb: float, streamed_gb: float, gflop: float, cache_mb: float) -> None:
    one = work(name)
    assert one.expert_bytes / 1e6 == pytest.approx(expert_mb, rel=1e-3)
    assert (one.layer_bytes + one.head_bytes) / 1e9 == pytest.approx(streamed_gb, rel=0.01)
    experts = 2 * one.expert_params * one.model.num_experts_per_tok * one.model.num_hidden_layers
    assert (one.layer_flops + one.head_flops + experts) / 1e9 == pytest.approx(gflop, rel=0.01)
    assert one.cache_bytes(8192) / 1e6 == pytest.approx(cache_mb, rel=0.01)


@pytest.mark.parametrize(
    ("name", "batch", "gigabytes"), [("v4_flash", 32, 86.0), ("v4_flash", 512, 154.9), ("v4_pro", 8, 124), ("v4_pro", 128, 739)]
)
def test_a_step_of_one_rank_reads_what_the_specification_says(name: str, batch: int, gigabytes: float) -> None:
    one, model = work(name), work(name).model
    experts = touched(model.n_routed_experts, 1, model.num_experts_per_tok, batch) * one.expert_bytes * model.num_hidden_layers
    assert (one.layer_bytes + one.head_bytes + experts) / 1e9 == pytest.approx(gigabytes, rel=0.01)


def test_touched_experts_are_the_same_by_chance_and_by_even_chances() -> None:
    assert touched(32, 8, 6, 100) == pytest.approx(touched_of([6 / 256] * 32, 100))
    assert touched(32, 8, 6, 1) == pytest.approx(6 / 8)
    assert touched_of([1.0, 0.0], 3) == 1.0


@pytest.mark.parametrize("software", SOFTWARE.values(), ids=lambda one: one.name)
def test_more_work_takes_longer_and_more_ranks_share_the_experts(software: Software) -> None:
    assert step(software=software, batch=64) > step(software=software, batch=32)
    assert step(software=software, context=131072) > step(software=software)
    assert step(software=software, imbalance=2.0) > step(software=software)
    assert step(software=software, drafts=2) > step(software=software, drafts=1) > step(software=software)
    one, two = (decode_parts(work("v4_flash"), GB300, software, ranks=ranks, batch=32, context=8192) for ranks in (1, 8))
    assert one["exchange"] == 0 < two["exchange"]
    assert two["experts"] < one["experts"]
    assert {name for name in one if one[name] != two[name]} == {"experts", "exchange", "gaps"}


def test_a_busiest_rank_bounds_the_experts_part_only() -> None:
    even = prefill_parts(work("v4_flash"), H200, AS_MEASURED, ranks=4, chunk=8192, prompt=8192)
    skewed = prefill_parts(work("v4_flash"), H200, AS_MEASURED, ranks=4, chunk=8192, prompt=8192, imbalance=1.5)
    assert {name for name in even if even[name] != skewed[name]} == {"experts"}
    assert 1.0 < skewed["experts"] / even["experts"] <= 1.5


def test_few_rows_are_bound_by_bytes_and_many_by_flops() -> None:
    one = work("v4_flash")
    assert experts_s(one, H200, AS_MEASURED, rows=256, experts=64) == pytest.approx(64 * one.expert_bytes / H200.memory_rate)
    many = experts_s(one, H200, AS_MEASURED, rows=64 * 768, experts=64)
    assert 2 * 64 * 768 * one.expert_params / many < H200.fp8_rate * AS_MEASURED.many_rows_share


def test_the_largest_batch_is_bound_by_time_or_by_memory() -> None:
    one = work("v4_pro")
    for limit_s in (0.02, 10.0):
        found = largest_batch(one, GB300, GOAL, ranks=16, tokens=9216, context=8704, limit_s=limit_s)
        used = one.rank_bytes(16) + found * one.sequence_bytes(9216)
        assert step("v4_pro", ranks=16, batch=found, context=8704) <= limit_s and used <= 0.94 * GB300.memory_bytes
        is_slow = step("v4_pro", ranks=16, batch=found + 1, context=8704) > limit_s
        is_full = used + one.sequence_bytes(9216) > 0.94 * GB300.memory_bytes
        assert (is_slow, is_full) == ((True, False) if limit_s < 1 else (False, True))
    assert largest_batch(one, GB300, GOAL, ranks=2, tokens=9216, context=8704, limit_s=1.0) == 0, "Pro's weights do not fit two GPUs"


MEASURED = ((1, 8192, 11.371, 1021.0, 516.8), (32, 8192, 16.744, 3073.5, 1473.6), (1, 921600, 12.207, 963.2, 507.2))
"""Batch, context, ms of the step, us of the experts' two kernels: V4-Flash on two H200s at b8bac3b."""


def test_decode_steps_of_few_sequences_are_predicted_within_a_tenth(tmp_path: pathlib.Path) -> None:
    decode = [
        {"batch": batch, "context": context, "ms": ms, "profile us": {"43 x moe_hidden_kernel": hidden, "43 x moe_out_kernel": out}}
        for batch, context, ms, hidden, out in MEASURED
    ]
    report = {"commit": "b8bac3b", "layers": 43, "ranks": 2, "ops": {"expert_exchange": "gather"}, "decode": decode, "prefill": []}
    path = tmp_path / "engine_flash_h200x2.json"
    path.write_text(json.dumps(report))
    rows = list(scaling_model.check([path], work("v4_flash")))
    assert [row["measured ms"] for row in rows] == [ms for _, _, ms, _, _ in MEASURED]
    assert all(row["how"] == "from kernels" and 0.001 < abs(row["error"]) < 0.1 for row in rows), [row["error"] for row in rows]


def test_every_recorded_run_is_compared() -> None:
    paths = sorted(scaling_model.RESULTS.glob("engine_flash_h200*.json"))
    reports = [json.loads(path.read_text()) for path in paths]
    rows = list(scaling_model.check(paths, work("v4_flash")))
    assert rows and len(rows) == sum(len(report["decode"]) + len(report["prefill"]) for report in reports)


def test_experts_are_taken_as_counted_where_the_run_counted_them() -> None:
    assert scaling_model.experts_seen({"experts": 430.0}, work("v4_flash"), 43, 2) == (10.0, "counted")
    assert scaling_model.experts_seen({}, work("v4_flash"), 43, 2) == (None, "uniform")
    found, how = scaling_model.experts_seen({"profile us": {"43 x moe_hidden_kernel": 1e9}}, work("v4_flash"), 43, 2)
    assert (found, how) == (128.0, "from kernels"), "a rank has no more experts than it holds"


def test_fewer_layers_weigh_in_proportion() -> None:
    whole, part = work("v4_flash"), scaling_model.cut(work("v4_flash"), 6)
    assert part.layer_bytes == pytest.approx(whole.layer_bytes * 6 / 43) and part.head_bytes == whole.head_bytes
    assert part.model.compress_ratios == whole.model.compress_ratios[:6]


def test_the_command_prints_three_tables_and_writes_what_it_found(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["scaling_model", "--ranks", "16", "--batch", "8", "--out", str(tmp_path / "found")])
    scaling_model.main()
    said = capsys.readouterr().out
    assert all(heading in said for heading in ("## Measured and predicted", "## v4_pro on GB300", "## Frontier of v4_pro"))
    report = json.loads((tmp_path / "found.json").read_text())
    assert report["check"] and report["groups"][0]["ranks"] == 16 and set(report["frontier"]) == {one.name for one in SOFTWARE.values()}
    assert (tmp_path / "found.png").stat().st_size > 10_000
    row = next(row for row in report["frontier"][WITH_DEEPEP.name] if row["batch"])
    shares = [row["prefill GPUs per decode GPU"], 1]
    out = row["output tokens/s per decode GPU"] * 9 / sum(shares)  # nine tokens of every request for each that is new
    assert row["tokens/s/GPU"] == pytest.approx(out, rel=0.05), "prompt and output tokens, over prefill and decode GPUs"


def test_spreading_attention_saves_weights_and_costs_gathers() -> None:
    one, four = (
        decode_parts(work("v4_flash"), H200, AS_MEASURED, ranks=4, batch=batch, context=8192, experts=2.0, attention_tp=size)
        for size, batch in ((1, 1), (4, 1))
    )
    saved = 0.75 * work("v4_flash").head_wise_bytes / H200.memory_rate
    assert one["projections"] - four["projections"] == pytest.approx(saved)
    assert set(four) - set(one) == {"gathers of attention_tp"}
    assert one["attention, index"] == four["attention, index"], "kernels take 64 heads at least"

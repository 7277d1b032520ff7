"""The scaling model: its counts are those of the specification, it moves the right way, and it is close to what was measured."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import pathlib
import sys
from typing import Any

import pytest

from tests.benchmarks import scaling_model
from tests.benchmarks.hardware import AS_MEASURED, GB300, GOAL, H200, HARDWARE, SOFTWARE, WITH_DEEPEP, Hardware, Software
from tests.benchmarks.scaling_check import check, cut, measured_parts, part_of, recorded
from tests.benchmarks.step_model import (
    Work,
    decode_parts,
    experts_s,
    largest_batch,
    prefill_parts,
    touched,
    touched_of,
    widened_layers,
)


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
    assert experts_s(one, H200, AS_MEASURED, rows=64, experts=64) == pytest.approx(64 * one.expert_bytes / H200.memory_rate, rel=0.01)
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


MEASURED = ((2, 1, 8192, 6.871, 0.02), (2, 32, 8192, 23.164, 0.08), (2, 128, 8192, 29.517, 0.03), (2, 256, 8192, 36.646, 0.03),
            (4, 32, 4096, 18.12, 0.12), (4, 128, 4096, 24.401, 0.1))  # fmt: skip
"""Ranks, batch, context, ms of the step, error: V4-Flash on H200s, 60ff249 (two GPUs) and cbe1b94 (four)."""


def report_of(ranks: int, **more: object) -> dict[str, object]:
    return {"commit": "0", "layers": 43, "ranks": ranks, "ops": {"expert_exchange": "direct"}, "widened layers": 0} | more


def checked(report: dict[str, object], folder: pathlib.Path) -> list[dict[str, Any]]:
    path = folder / "engine_flash_h200x.json"
    path.write_text(json.dumps(report))
    return list(check([path], work("v4_flash")))


@pytest.mark.parametrize(("ranks", "batch", "context", "ms", "error"), MEASURED)
def test_decode_steps_are_predicted_as_closely_as_the_page_says(
    tmp_path: pathlib.Path, ranks: int, batch: int, context: int, ms: float, error: float
) -> None:
    (row,) = checked(report_of(ranks, decode=[{"batch": batch, "context": context, "ms": ms}], routing="even"), tmp_path)
    assert row["measured ms"] == ms and 0 < abs(row["predicted ms"] / ms - 1) < error, row


def test_every_recorded_run_is_compared() -> None:
    reports = [json.loads(path.read_text()) for path in recorded()]
    rows = list(check(recorded(), work("v4_flash")))
    assert len(rows) == sum(len(report.get(kind, [])) for report in reports for kind in ("decode", "prefill", "rows"))
    assert {row["GPUs"] for row in rows} >= {2, 4} and {row["step"].split()[0] for row in rows} == {"decode", "prefill"}


def test_counted_experts_are_used_only_where_they_were_not_chosen_evenly(tmp_path: pathlib.Path) -> None:
    decode = [{"batch": 32, "context": 8192, "ms": 20.0, "experts": 430.0}]
    even, scored = (checked(report_of(2, decode=decode, routing=routing), tmp_path)[0] for routing in ("even", "scored"))
    assert even["experts counted"] == scored["experts counted"] == 10.0
    assert scored["parts ms"]["experts"] < even["parts ms"]["experts"] / 4


def test_a_run_is_compared_with_the_exchange_that_it_had(tmp_path: pathlib.Path) -> None:
    prefill = {"prompt": 8192, "prompts": 1, "chunk": 8192, "ms": 400.0}
    older, newer = {"43 x ncclDevKernel_AllGather": 2e4}, {"43 x ncclDevKernel_AllGather": 1e4, "43 x exchange_sum_kernel": 1e3}
    rows = checked(report_of(2, prefill=[prefill | {"profile us": profile} for profile in (older, newer)]), tmp_path)
    assert [row["measured parts ms"]["exchange"] for row in rows] == [20.0, 11.0]
    assert rows[0]["parts ms"]["exchange"] > 1.5 * rows[1]["parts ms"]["exchange"]


def test_kernels_belong_to_the_parts_that_the_model_has() -> None:
    gemm = "43 x void deep_gemm::sm90_fp8_gemm_1d2d_impl<(cute::UMMA::Major)0, "
    kernels = {
        "exchange": ["43 x direct_combine_kernel"], "attention, index": ["43 x combine_kernel", "43 x flash_fwd_mla_combine_kernel"],
        "projections, head": [gemm + "0u, 0u, 0u, 1u", "86 x widen_kernel"], "experts": [gemm + "0u, 4096u, 4096u", "8 x moe_widen_kernel"],
        "small kernels": ["21 x index_topk"], "gaps": ["idle"],
    }  # fmt: skip
    for part, names in kernels.items():
        assert [part_of(name, is_prefill=False) for name in names] == [part] * len(names)
    assert part_of("21 x index_topk", is_prefill=True) == "attention, index"
    assert measured_parts({"43 x nccl:_all_gather_base": 5.0, "idle": 1000.0}, is_prefill=False)["exchange"] == 0.0


def test_fewer_layers_weigh_in_proportion() -> None:
    whole, part = work("v4_flash"), cut(work("v4_flash"), 6)
    assert part.layer_bytes == pytest.approx(whole.layer_bytes * 6 / 43) and part.head_bytes == whole.head_bytes
    assert part.model.compress_ratios == whole.model.compress_ratios[:6]


def test_experts_in_fp8_save_the_widening_and_take_room() -> None:
    one = work("v4_flash")
    kept, wide = (prefill_parts(one, H200, AS_MEASURED, ranks=2, chunk=8192, prompt=8192, widened_layers=layers) for layers in (0, 43))
    assert kept["experts"] - wide["experts"] == pytest.approx(43 * 128 * (one.expert_bytes + one.expert_params) / 3.59e12, rel=0.01)
    assert {name for name in kept if kept[name] != wide[name]} == {"experts"}
    assert 0 == widened_layers(one, H200, 1) < widened_layers(one, H200, 2) < widened_layers(one, H200, 8) == 43


def test_a_step_in_two_halves_pays_where_the_exchange_is_long() -> None:
    options = argparse.Namespace(ranks=[4, 72], batch=[32, 512], context=[8192], imbalance=1.0)
    found = {(row["ranks"], row["step"]): row for row in scaling_model.two_batches(work("v4_pro"), GB300, GOAL, options)}
    assert len(found) == 6
    for row in found.values():
        pays = row["pays with an exchange so many times as long"] < 1
        assert (row["two batches ms"] < row["ms"]) == pays, row
    assert found[72, "decode 512"]["change"].startswith("-") and found[4, "decode 32"]["change"].startswith("+")
    assert not any(row["ranks"] > 8 for row in scaling_model.two_batches(work("v4_pro"), GB300, AS_MEASURED, options))


def test_the_command_prints_three_tables_and_writes_what_it_found(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["scaling_model", "--ranks", "8", "--batch", "8", "--two-batches", "--out", str(tmp_path / "found")])
    scaling_model.main()
    said = capsys.readouterr().out
    headings = "## Measured and predicted", "## v4_pro on GB300", "a step in two halves", "## Frontier of v4_pro"
    assert all(heading in said for heading in headings)
    report = json.loads((tmp_path / "found.json").read_text())
    assert report["check"] and report["groups"][0]["ranks"] == 8 and set(report["frontier"]) == {one.name for one in SOFTWARE.values()}
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
    saved += 0.75 * work("v4_flash").head_wise_flops / (H200.fp8_rate * AS_MEASURED.few_linear_share)
    assert one["projections"] - four["projections"] == pytest.approx(saved)
    assert set(four) - set(one) == {"gathers of attention_tp"}
    assert one["attention, index"] == four["attention, index"], "kernels take 64 heads at least"

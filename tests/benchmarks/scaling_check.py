"""The scaling model beside what was measured: every step of V4-Flash on H200s in `results`, whole and by part.

    rows = list(check(recorded(), work_of("v4_flash")))

Takes `engine_flash_h200*.json` (`bench_engine`, any number of ranks and layers) and `waiting_flash_h200*.json` (`bench_waiting`).
Nothing of a run goes into its prediction but its shape and which exchange it had; where experts were not chosen evenly, also how many
were touched.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from tests.benchmarks.hardware import AS_MEASURED, H200, OLDER_EXCHANGE, WITH_DEEPEP, Software
from tests.benchmarks.step_model import Parts, Work, decode_parts, prefill_parts

RESULTS = pathlib.Path(__file__).resolve().parent / "results"

KERNELS = (
    ("exchange", ("ncclDev", "direct_", "exchange_", "deep_ep::")),
    ("projections, head", ("vector_kernel", "linear", "act_quant", "0u, 0u, 0u, ", "nvjet", "splitKreduce", " x widen")),
    ("experts", ("moe_hidden", "moe_out", "moe_widen", "fp8_gemm")),
    ("attention, index", ("flash_", "sparse_attn", "attn_", "combine_kernel", "mla_metadata", "logits")),
    ("hyper-connections", ("project_kernel", "finish_kernel", "hc_")),
    ("gaps", ("idle",)),
)
"""Part -> words in the names of its kernels; the first that has one."""
PREFILL_INDEX = ("index_query", "index_topk")
"""In prefill these are of the index, too; in decode small kernels."""
REST = "small kernels"
PARTS = (*(name for name, _ in KERNELS), REST)
GROUPED = {
    "projections": "projections, head", "head": "projections, head", "attention": "attention, index", "index": "attention, index",
    "norms, rope, stores, quantisation": REST,
}  # fmt: skip
"""Part of the model -> of the comparison, where it has another name."""


def recorded() -> list[pathlib.Path]:
    return sorted(RESULTS.glob("engine_flash_h200*.json")) + sorted(RESULTS.glob("waiting_flash_h200*.json"))


def cut(work: Work, layers: int) -> Work:
    """The first `layers` layers, each as heavy as the mean."""
    model = work.model
    if layers == model.num_hidden_layers:
        return work
    share = layers / model.num_hidden_layers
    shorter = dataclasses.replace(model, num_hidden_layers=layers, compress_ratios=model.compress_ratios[:layers])
    fields = ("layer_bytes", "layer_flops", "bf16_flops", "head_wise_bytes", "head_wise_flops")
    return dataclasses.replace(work, model=shorter, **{name: getattr(work, name) * share for name in fields})


def exchange_of(report: dict[str, Any], row: dict[str, Any]) -> Software:
    """What the run had, by the kernels of its profile."""
    if report["ops"].get("expert_exchange") == "deepep":
        return WITH_DEEPEP
    kernels = " ".join(row.get("profile us", {}))
    is_older = "ncclDev" in kernels and "exchange_sum" not in kernels
    return OLDER_EXCHANGE if is_older else AS_MEASURED


def check(paths: Sequence[pathlib.Path], work: Work) -> Iterator[dict[str, Any]]:
    """A row for each measured point."""
    for path in paths:
        report = json.loads(path.read_text())
        part = cut(work, report["layers"])
        for row in report.get("decode", []):
            yield _decode(path, report, part, report["ranks"], row["ms"], row)
        for row in report.get("rows", []):
            yield _decode(path, report, part, row["ranks"], row["step ms"], row)
        for row in report.get("prefill", []):
            parts = prefill_parts(
                part, H200, exchange_of(report, row), ranks=report["ranks"], chunk=row["chunk"], prompt=row["prompt"],
                prompts=row.get("prompts", 1), widened_layers=row.get("widened layers", report["widened layers"]),
            )  # fmt: skip
            shape = f"prefill {row.get('prompts', 1)} x {row['prompt']}"
            yield _compared(path, report, report["ranks"], shape, row["ms"], row, parts)


def _decode(path: pathlib.Path, report: dict[str, Any], part: Work, ranks: int, ms: float, row: dict[str, Any]) -> dict[str, Any]:
    layers, counted = report["layers"], row.get("experts")
    parts = decode_parts(
        part, H200, exchange_of(report, row), ranks=ranks, batch=row["batch"], context=row["context"],
        experts=counted / layers if counted is not None and report.get("routing") == "scored" else None,
    )  # fmt: skip
    found = _compared(path, report, ranks, f"decode {row['batch']} x {row['context']}", ms, row, parts)
    return found | {"experts counted": None if counted is None or ranks == 1 else round(counted / layers, 1)}


def _compared(
    path: pathlib.Path, report: dict[str, Any], ranks: int, shape: str, ms: float, row: dict[str, Any], parts: Parts
) -> dict[str, Any]:  # fmt: skip
    predicted = sum(parts.values()) * 1e3
    return {
        "file": path.stem, "commit": row.get("commit", report["commit"]), "layers": report["layers"], "GPUs": ranks, "step": shape,
        "measured ms": ms, "predicted ms": round(predicted, 2), "error": f"{predicted / ms - 1:+.1%}",
        "parts ms": {name: round(seconds * 1e3, 2) for name, seconds in parts.items()},
        "measured parts ms": measured_parts(row.get("profile us", {}), shape.startswith("prefill")),
    }  # fmt: skip


def measured_parts(profile: dict[str, float], is_prefill: bool) -> Parts:
    """Milliseconds of the kernels of each part of the comparison; those that run side by side count each."""
    spent: Parts = dict.fromkeys(PARTS, 0.0) if profile else {}
    for kernel, us in profile.items():
        if "nccl:" not in kernel:  # the annotation around NCCL's kernel
            spent[part_of(kernel, is_prefill)] += us / 1e3
    return {name: round(ms, 2) for name, ms in spent.items()}


def part_of(kernel: str, is_prefill: bool) -> str:
    if is_prefill and any(word in kernel for word in PREFILL_INDEX):
        return "attention, index"
    return next((name for name, words in KERNELS if any(word in kernel for word in words)), REST)


def beside(row: dict[str, Any]) -> dict[str, str]:
    """Part -> "measured / predicted", ms."""
    predicted = dict.fromkeys(PARTS, 0.0)
    for name, ms in row["parts ms"].items():
        predicted[GROUPED.get(name, name)] += ms
    return {name: f"{row['measured parts ms'][name]:.2f} / {predicted[name]:.2f}" for name in PARTS}

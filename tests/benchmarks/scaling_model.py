"""Predict decode and prefill of a group of N ranks, and say how far the predictions are from what was measured. No device needed.

python -m tests.benchmarks.scaling_model [--model v4_pro] [--hardware gb300] [--software measured,deepep,goal] [--ranks 8,16,32,72]
    [--batch 1,32,128,256] [--context 8192] [--imbalance 1.0] [--drafts 0] [--attention-tp 1,2,4]
    [--two-batches] [--out tests/benchmarks/results/scaling_2026-11]

Prints tables in Markdown: each measured point of `results` beside its prediction, whole and by part (`scaling_check.py`); decode and
prefill of groups; the frontier for 8,192 tokens in and 1,024 out. `--out` writes them as PREFIX.json and a plot as PREFIX.png.

Left out, all of it in the predictions' favour: sampling and the host's work between steps; waiting for a slower rank beyond `--imbalance`;
the hand-over from prefill to decode; router, queues, and batches that are not full; prompts of unequal length. Against them: parts follow
one another, where kernels on side streams or a second batch could overlap.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from engine.config import ModelConfig
from tests.benchmarks.command_line import ints
from tests.benchmarks.hardware import HARDWARE, SOFTWARE, Hardware, Software
from tests.benchmarks.scaling_check import PARTS, beside, check, recorded
from tests.benchmarks.step_model import Work, decode_parts, largest_batch, prefill_parts, touched, widened_layers

ROOT = pathlib.Path(__file__).resolve().parents[2]

ACCEPTED = (1.0, 1.79, 2.27, 2.49)
"""Tokens a step with 0 to 3 drafts: the public figures of V4-Pro, thinking."""

PUBLIC = (
    ("SGLang, April 2026, no MTP", False, 50, 2_200),
    ("SGLang, June 2026, MTP", True, 50, 11_200),
    ("vLLM, 2026", False, 27, 6_182),
)
"""V4-Pro FP4 on GB300, 8K in and 1K out: (who, with drafts, tokens/s a user, a GPU; InferenceX, which counts prompt tokens, too)."""

PROMPT, OUTPUT = 8192, 1024
FEW_USERS = (1, 4, 8, 16)
USER_RATES = (20, 27, 30, 40, 50, 60, 80, 100)
PRINTED_RATES = (20, 30, 50, 80)


def work_of(name: str) -> Work:
    return Work.of(ModelConfig.from_folder(ROOT / "deploy/model_shapes" / name))


# -- groups


def within(ranks: Sequence[int], software: Software) -> list[int]:
    return [size for size in ranks if size <= software.most_ranks]


def prompt_s(work: Work, hardware: Hardware, software: Software, ranks: int, imbalance: float) -> float:
    """A prompt on each rank of a prefill group, with experts in FP8 in as many layers as there is room for."""
    widened = widened_layers(work, hardware, ranks) if software.widens else 0
    parts = prefill_parts(
        work, hardware, software, ranks=ranks, chunk=PROMPT, prompt=PROMPT, imbalance=imbalance, widened_layers=widened
    )  # fmt: skip
    return sum(parts.values())


def predict(work: Work, hardware: Hardware, software: Software, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for ranks in within(options.ranks, software):
        prefill_s = prompt_s(work, hardware, software, ranks, options.imbalance)
        for context in options.context:
            for batch in options.batch:
                parts = decode_parts(
                    work, hardware, software, ranks=ranks, batch=batch, context=context, imbalance=options.imbalance, drafts=options.drafts
                )
                seconds = sum(parts.values())
                weights = work.rank_bytes(ranks)
                yield {
                    "software": software.name, "ranks": ranks, "batch": batch, "context": context, "ms": round(seconds * 1e3, 2),
                    "tokens/s/user": round(ACCEPTED[options.drafts] / seconds, 1),
                    "tokens/s/GPU": round(batch * ACCEPTED[options.drafts] / seconds),
                    "prefill tokens/s/GPU": round(PROMPT / prefill_s),
                    "fits": weights + batch * work.sequence_bytes(context + OUTPUT) <= 0.94 * hardware.memory_bytes,
                    "parts ms": {name: round(value * 1e3, 2) for name, value in parts.items()},
                }  # fmt: skip


def spread(work: Work, hardware: Hardware, software: Software, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Steps of a group with few users, with attention spread over some of its ranks; rows that only fill up have no experts."""
    for ranks in within(options.ranks, software):
        for users in FEW_USERS:
            experts = touched(work.held(ranks), ranks, work.model.num_experts_per_tok, users, options.imbalance)
            row: dict[str, Any] = {"software": software.name, "ranks": ranks, "users": users}
            for size in options.attention_tp:
                parts = decode_parts(
                    work, hardware, software, ranks=ranks, batch=-(-users * size // ranks), context=options.context[0], experts=experts,
                    attention_tp=size,
                )  # fmt: skip
                row[f"ms, attention_tp {size}"] = round(sum(parts.values()) * 1e3, 2)
            yield row


def frontier(work: Work, hardware: Hardware, software: Software, ranks: Sequence[int], imbalance: float) -> Iterator[dict[str, Any]]:
    """For each decode group and speed a user gets: as many sequences as keep it, and as many prefill GPUs (groups of 4) as feed them."""
    prefill_s = prompt_s(work, hardware, software, 4, imbalance)
    for drafts, accepted in enumerate(ACCEPTED):
        for size in within(ranks, software):
            for rate in USER_RATES:
                batch = largest_batch(
                    work, hardware, software, ranks=size, tokens=PROMPT + OUTPUT, context=PROMPT + OUTPUT // 2, limit_s=accepted / rate,
                    drafts=drafts, imbalance=imbalance,
                )  # fmt: skip
                decode_s = OUTPUT / (rate * batch) if batch else None
                yield {
                    "software": software.name, "drafts": drafts, "ranks": size, "tokens/s/user": rate, "batch": batch,
                    "output tokens/s per decode GPU": batch * rate,
                    "prefill GPUs per decode GPU": round(prefill_s / decode_s, 2) if decode_s else None,
                    "tokens/s/GPU": round((PROMPT + OUTPUT) / (prefill_s + decode_s)) if decode_s else 0,
                }  # fmt: skip


def two_batches(work: Work, hardware: Hardware, software: Software, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Steps as they are, and as two halves of which one computes while the other's tokens and sums travel: weights are read and kernels
    started twice. At best, that is with an exchange that takes nothing from the kernels beside it."""
    for ranks in within(options.ranks, software):
        widened = widened_layers(work, hardware, ranks) if software.widens else 0
        steps = {
            f"decode {batch}": [
                decode_parts(work, hardware, software, ranks=ranks, batch=rows, context=options.context[0], imbalance=options.imbalance)
                for rows in (batch, batch / 2, batch / 2)
            ]
            for batch in options.batch
        }
        steps[f"prefill {PROMPT}"] = [
            prefill_parts(
                work, hardware, software, ranks=ranks, chunk=chunk, prompt=PROMPT, imbalance=options.imbalance, widened_layers=widened
            )
            for chunk in (PROMPT, PROMPT // 2)
        ]
        for name, (whole, *halves) in steps.items():
            step, sent = sum(whole.values()), sum(half["exchange"] for half in halves)
            computes = sum(sum(half.values()) for half in halves) - sent
            apart, adds = max(computes, sent), computes - step + whole["exchange"]
            yield {
                "software": software.name, "ranks": ranks, "step": name,
                "ms": round(step * 1e3, 2), "exchange ms": round(whole["exchange"] * 1e3, 2),
                "computing in two adds ms": round(adds * 1e3, 2), "two batches ms": round(apart * 1e3, 2),
                "change": f"{apart / step - 1:+.0%}", "pays with an exchange so many times as long": round(adds / whole["exchange"], 1),
            }  # fmt: skip


def best(rows: Sequence[dict[str, Any]], has_drafts: bool) -> dict[int, dict[str, Any]]:
    """Speed a user gets -> the row with the most tokens/s a GPU, of those with drafts or of those without."""
    found: dict[int, dict[str, Any]] = {}
    for row in rows:
        if bool(row["drafts"]) == has_drafts and row["batch"]:
            rate = row["tokens/s/user"]
            found[rate] = max(found.get(rate, row), row, key=lambda one: one["tokens/s/GPU"])
    return found


def beside_public(curves: Mapping[str, Sequence[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    for who, has_drafts, rate, total in PUBLIC:
        predicted = {name: best(rows, has_drafts).get(rate) for name, rows in curves.items()}
        yield {"public, V4-Pro FP4 on GB300": who, "tokens/s/user": rate, "tokens/s/GPU": total} | {
            name: row["tokens/s/GPU"] if row else "none" for name, row in predicted.items()
        }


# -- out


def table(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> str:
    def said(cell: Any) -> str:
        if isinstance(cell, bool):
            return "yes" if cell else "no"
        return f"{cell:,}" if isinstance(cell, int | float) else str(cell)

    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join(lines + ["| " + " | ".join(said(row[column]) for column in columns) + " |" for row in rows])


def plot(checked: Sequence[dict[str, Any]], curves: Mapping[str, Sequence[dict[str, Any]]], title: str, out: pathlib.Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.5))
    for kind, color in (("decode", "tab:blue"), ("prefill", "tab:orange")):
        for ranks, marker in ((1, "x"), (2, "o"), (4, "s")):
            points = [row for row in checked if row["step"].startswith(kind) and row["GPUs"] == ranks]
            if points:
                ends = [[row[what] for row in points] for what in ("measured ms", "predicted ms")]
                left.loglog(*ends, marker, color=color, label=f"{kind}, {ranks} GPU{'s' if ranks > 1 else ''}", fillstyle="none")
    ends = [min(row["measured ms"] for row in checked) / 1.5, max(row["measured ms"] for row in checked) * 1.5]
    left.plot(ends, ends, color="black", linewidth=0.8)
    left.set_xlabel("measured ms, V4-Flash on H200s")
    left.set_ylabel("predicted ms")
    left.legend()
    for name, rows in curves.items():
        for has_drafts, style in ((False, "-"), (True, "--")):
            found = sorted(best(rows, has_drafts).items())
            if found:
                label = f"{name}, {'MTP' if has_drafts else 'no MTP'}"
                right.plot([rate for rate, _ in found], [row["tokens/s/GPU"] for _, row in found], style, marker=".", label=label)
    for name, _, rate, total in PUBLIC:
        right.plot([rate], [total], "k*")
        right.annotate(name, (rate, total), textcoords="offset points", xytext=(6, 4), fontsize=7)
    right.set_xlabel("tokens/s a user")
    right.set_ylabel("prompt and output tokens/s a GPU")
    right.set_title(title, fontsize=9)
    right.set_ylim(0, 20_000)
    right.legend(fontsize=7, ncol=3, loc="upper center")
    figure.tight_layout()
    figure.savefig(out, dpi=130)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Predicted decode and prefill of groups of ranks, beside what was measured.")
    parser.add_argument("--model", choices=["v4_flash", "v4_pro"], default="v4_pro")
    parser.add_argument("--hardware", choices=sorted(HARDWARE), default="gb300")
    parser.add_argument("--software", default=",".join(SOFTWARE), help="of the tables of groups; the frontier shows all")
    parser.add_argument("--ranks", type=ints, default=[8, 16, 32, 72])
    parser.add_argument("--batch", type=ints, default=[1, 32, 128, 256], help="sequences of each rank")
    parser.add_argument("--context", type=ints, default=[8192])
    parser.add_argument("--imbalance", type=float, default=1.0, help="the busiest rank's share of the experts' work over the mean")
    parser.add_argument("--drafts", type=int, choices=range(len(ACCEPTED)), default=0, help="MTP steps")
    parser.add_argument("--attention-tp", type=ints, default=[], help="also decode with attention spread over so many ranks")
    parser.add_argument("--two-batches", action="store_true", help="also decode in two halves, one computing while the other is sent")
    parser.add_argument("--out", type=pathlib.Path, default=None, metavar="PREFIX")
    return parser.parse_args()


def main() -> None:
    options = parse()
    checked = list(check(recorded(), work_of("v4_flash")))
    print("\n## Measured and predicted\n")
    print(table(checked, ["commit", "GPUs", "layers", "step", "measured ms", "predicted ms", "error"]))
    print("\n## Their parts, ms of kernels (side by side counted each) / predicted\n")
    print(table([row | beside(row) for row in checked if row["measured parts ms"]], ["commit", "GPUs", "layers", "step", *PARTS]))
    work, hardware = work_of(options.model), HARDWARE[options.hardware]
    chosen = [SOFTWARE[name] for name in options.software.split(",")]
    groups = [row for software in chosen for row in predict(work, hardware, software, options)]
    print(f"\n## {options.model} on {hardware.name}\n")
    columns = ["software", "ranks", "batch", "context", "ms", "tokens/s/user", "tokens/s/GPU", "prefill tokens/s/GPU", "fits"]
    print(table(groups, columns))
    if options.attention_tp:
        rows = [row for software in chosen for row in spread(work, hardware, software, options)]
        print(f"\n## {options.model} on {hardware.name}: attention spread over ranks\n")
        print(table(rows, list(rows[0])))
    if options.two_batches:
        rows = [row for software in chosen for row in two_batches(work, hardware, software, options)]
        print(f"\n## {options.model} on {hardware.name}: a step in two halves\n")
        print(table(rows, list(rows[0])))
    curves = {software.name: list(frontier(work, hardware, software, options.ranks, options.imbalance)) for software in SOFTWARE.values()}
    print(f"\n## Frontier of {options.model} on {hardware.name}, {PROMPT} in and {OUTPUT} out, best group of {options.ranks}\n")
    columns = ["software", "drafts", "ranks", "tokens/s/user", "batch", "prefill GPUs per decode GPU", "tokens/s/GPU"]
    found = [row for rows in curves.values() for has in (False, True) for _, row in sorted(best(rows, has).items())]
    print(table([row for row in found if row["tokens/s/user"] in PRINTED_RATES], columns))
    print("\n## Public figures of V4-Pro on GB300, and what is predicted there\n")
    print(table(list(beside_public(curves)), ["public, V4-Pro FP4 on GB300", "tokens/s/user", "tokens/s/GPU", *curves]))
    if options.out is not None:
        report = {"check": checked, "groups": groups, "frontier": curves, "public": PUBLIC}
        report["hardware"] = {name: dataclasses.asdict(one) for name, one in HARDWARE.items()}
        report["software"] = {name: dataclasses.asdict(one) for name, one in SOFTWARE.items()}
        options.out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
        plot(checked, curves, f"{options.model} on {hardware.name}, {PROMPT} in, {OUTPUT} out", options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()

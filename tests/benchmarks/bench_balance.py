"""How evenly a group's ranks share the experts of a skewed, drifting trace, before and after rebalancing, and what that does to tokens/s.

python -m tests.benchmarks.bench_balance [--model v4_flash] [--hardware gb300] [--software deepep] [--ranks 2,4,8,16,72] [--redundant 0,1,2]
    [--skew 0.6] [--drift 0.05] [--layers 6] [--windows 6] [--batch 128] [--seed 0] [--out results/balance_2026-11.json]

No device: routing is drawn, times are the scaling model's. Each layer's experts have a popularity of rank^-skew in an order of their own;
from one window to the next `drift` of them exchange their places in that order. A token takes `top_k` different ones. Compared are

    as numbered    what a group starts with: rank r holds the r-th part
    once           placed by the load of the first window, and left so
    each window    as the engine does: placed by the load of the window before, if the busiest rank gains enough (rebalance.LEAST_GAIN)

over the windows after the first, with copies taken in turns as `SlotChoice` does. Imbalance is the busiest rank's rows over the mean: of a
whole window, and of one decode step of `batch` tokens a rank, where chance alone makes some ranks busier. A layer takes as long as its
busiest rank.
"""

from __future__ import annotations

import argparse
import json
import pathlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from engine.parallel.expert_placement import ExpertPlacement, balanced_placement, even_placement, imbalance, rebalanced
from engine.parallel.rebalance import LEAST_GAIN, MOST_COMING
from tests.benchmarks.command_line import ints
from tests.benchmarks.hardware import HARDWARE, SOFTWARE, Hardware, Software
from tests.benchmarks.scaling_model import table, work_of
from tests.benchmarks.step_model import Work, decode_parts, experts_s, prefill_parts

CHUNK = 8192
"""Prompt tokens of each rank in a prefill step."""
PLACED = ("as numbered", "once", "each window")


@dataclass(frozen=True, slots=True)
class Trace:
    """Routing of some layers in some windows."""

    ids: list[list[torch.Tensor]]
    """[layer][window]: int64 [tokens, top_k]."""
    num_experts: int

    def load(self, layer: int, window: int) -> list[int]:
        return [int(count) for count in torch.bincount(self.ids[layer][window].flatten(), minlength=self.num_experts)]


def drawn(
    num_experts: int, top_k: int, *, layers: int, windows: int, tokens: int, skew: float, drift: float, generator: torch.Generator
) -> Trace:
    """Different experts of a token with the chances of their popularity: the largest of log p + Gumbel noise."""
    found = []
    for _ in range(layers):
        order = torch.randperm(num_experts, generator=generator)
        row = []
        for _ in range(windows):
            popularity = (order + 1).double() ** -skew
            noise = -torch.empty(tokens, num_experts).exponential_(generator=generator).log()
            row.append((popularity.log().float() + noise).topk(top_k, dim=1).indices)
            order = drifted(order, drift, generator)
        found.append(row)
    return Trace(found, num_experts)


def drifted(order: torch.Tensor, drift: float, generator: torch.Generator) -> torch.Tensor:
    """A share of the places, exchanged among themselves."""
    moving = torch.randperm(len(order), generator=generator)[: round(drift * len(order))]
    order = order.clone()
    order[moving] = order[moving.roll(1)]
    return order


def placements(trace: Trace, layer: int, ranks: int, redundant: int) -> dict[str, list[ExpertPlacement]]:
    """For each of PLACED, the placement in force in each window after the first. `redundant`: further experts a rank."""
    windows = len(trace.ids[layer])
    slots = -(-trace.num_experts // ranks) + redundant
    start = even_placement(trace.num_experts, ranks, slots * ranks - trace.num_experts)
    once = balanced_placement(trace.load(layer, 0), ranks, slots)
    held, moving = start, []
    for window in range(windows - 1):
        held = rebalanced(trace.load(layer, window), held, LEAST_GAIN, MOST_COMING) or held
        moving.append(held)
    return {"as numbered": [start] * (windows - 1), "once": [once] * (windows - 1), "each window": moving}


def step_load(ids: torch.Tensor, placement: ExpertPlacement, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """ids: int64 [ranks * batch, k], `batch` tokens of each rank in turn. (rows of each rank, experts of each rank that have any)."""
    copies = placement.copies()
    turns = torch.tensor([len(slots) for slots in copies])
    slots_of = torch.tensor([(slots * int(turns.max()))[: int(turns.max())] for slots in copies])
    number = torch.arange(len(ids))
    turn = (number // batch + number % batch)[:, None] % turns[ids]
    rows = torch.bincount(slots_of[ids, turn].flatten(), minlength=len(placement.experts)).view(placement.num_ranks, -1)
    return rows.sum(1), (rows > 0).sum(1)


@dataclass(frozen=True, slots=True)
class Found:
    """Means over layers and windows."""

    window: float
    """Imbalance of the whole window."""
    step: float
    """Of one decode step."""
    decode_s: float
    """One layer's experts in a decode step, on the slowest rank."""
    prefill_s: float


def measured(
    trace: Trace, ranks: int, batch: int, layer_s: Callable[[float, float], float], chosen: Sequence[list[ExpertPlacement]]
) -> Found:
    """`chosen`: [layer][window - 1]. `layer_s(rows, experts)`: seconds."""
    sums, count = [0.0] * 4, 0
    for layer, row in enumerate(trace.ids):
        for window, placement in enumerate(chosen[layer], start=1):
            rows, experts = step_load(row[window][: ranks * batch], placement, batch)
            whole = imbalance(trace.load(layer, window), placement)
            prompt_rows = whole * CHUNK * row[window].shape[1]
            found = (
                whole,
                float(rows.max() * ranks / rows.sum()),
                max(layer_s(float(r), float(e)) for r, e in zip(rows, experts, strict=True)),
                layer_s(prompt_rows, float(placement.slots_per_rank)),
            )
            sums, count = [total + one for total, one in zip(sums, found, strict=True)], count + 1
    return Found(*(total / count for total in sums))


def report(
    work: Work, hardware: Hardware, software: Software, trace: Trace, ranks: int, redundant: int, batch: int
) -> Iterator[dict[str, Any]]:
    """A row for each of PLACED."""
    layers = work.model.num_hidden_layers
    by_layer = [placements(trace, layer, ranks, redundant) for layer in range(len(trace.ids))]

    def layer_s(rows: float, experts: float) -> float:
        return experts_s(work, hardware, software, rows, experts)

    decode = decode_parts(work, hardware, software, ranks=ranks, batch=batch, context=8192, experts=0.0)
    rest = sum(seconds for name, seconds in decode.items() if name != "experts") + 2 * layers * software.expert_s
    prefill = prefill_parts(work, hardware, software, ranks=ranks, chunk=CHUNK, prompt=CHUNK)
    prefill_rest = sum(seconds for name, seconds in prefill.items() if name != "experts")
    for name in PLACED:
        found = measured(trace, ranks, batch, layer_s, [one[name] for one in by_layer])
        yield {
            "ranks": ranks, "redundant a rank": redundant, "slots a rank": by_layer[0][name][0].slots_per_rank, "placed": name,
            "window": round(found.window, 3), "step": round(found.step, 3), "step ms": round((rest + layers * found.decode_s) * 1e3, 2),
            "decode tokens/s/GPU": round(batch / (rest + layers * found.decode_s)),
            "prefill tokens/s/GPU": round(CHUNK / (prefill_rest + layers * found.prefill_s)),
        }  # fmt: skip


def in_one_row(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A row of the printed table from the three of `report`."""
    first, last = rows[0], rows[-1]

    def side_by_side(key: str) -> str:
        return " / ".join(f"{row[key]:,.2f}" if isinstance(row[key], float) else f"{row[key]:,}" for row in rows)

    def gain(key: str) -> str:
        return f"{last[key] / first[key] - 1:+.0%}"

    return {
        "ranks": first["ranks"], "redundant (slots) a rank": f"{first['redundant a rank']} ({first['slots a rank']})",
        "imbalance of a window": side_by_side("window"), "of a step": side_by_side("step"),
        "decode tokens/s/GPU": side_by_side("decode tokens/s/GPU"), "gain": gain("decode tokens/s/GPU"),
        "prefill tokens/s/GPU": side_by_side("prefill tokens/s/GPU"), "gain ": gain("prefill tokens/s/GPU"),
    }  # fmt: skip


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Imbalance of expert-parallel ranks before and after rebalancing, and its price.")
    parser.add_argument("--model", choices=["v4_flash", "v4_pro"], default="v4_flash")
    parser.add_argument("--hardware", choices=sorted(HARDWARE), default="gb300")
    parser.add_argument("--software", choices=list(SOFTWARE), default="deepep")
    parser.add_argument("--ranks", type=ints, default=[2, 4, 8, 16, 72])
    parser.add_argument("--redundant", type=ints, default=[0, 1, 2], help="further experts of a layer on each rank")
    parser.add_argument("--skew", type=float, default=0.6)
    parser.add_argument("--drift", type=float, default=0.05, help="share of experts that exchange popularity from window to window")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--windows", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=20_000, help="of a window; at least those of a decode step")
    parser.add_argument("--batch", type=int, default=128, help="decode tokens of each rank in a step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, default=None)
    return parser.parse_args()


def main() -> None:
    options = parse()
    work, hardware, software = work_of(options.model), HARDWARE[options.hardware], SOFTWARE[options.software]
    model = work.model
    trace = drawn(
        model.n_routed_experts, model.num_experts_per_tok, layers=options.layers, windows=options.windows,
        tokens=max(options.tokens, options.batch * max(options.ranks)), skew=options.skew, drift=options.drift,
        generator=torch.Generator().manual_seed(options.seed),
    )  # fmt: skip
    rows = []
    for ranks in options.ranks:
        for redundant in options.redundant:
            rows.append(list(report(work, hardware, software, trace, ranks, redundant, options.batch)))
    print(f"\n{options.model}, {hardware.name}, {software.name}, skew {options.skew:g}, drift {options.drift:g}: {' / '.join(PLACED)}\n")
    printed = [in_one_row(row) for row in rows]
    print(table(printed, list(printed[0])))
    if options.out is not None:
        said = {name: value for name, value in vars(options).items() if name != "out"}
        options.out.write_text(json.dumps({"options": said, "rows": [one for row in rows for one in row]}, indent=1) + "\n")


if __name__ == "__main__":
    main()

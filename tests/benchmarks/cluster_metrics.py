"""What the members of a running cluster say of themselves, summed up for a benchmark."""

from __future__ import annotations

import collections
import json
import pathlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

Counts = dict[tuple[str, str], float]
"""(layer, expert) -> tokens."""


@dataclass(frozen=True, slots=True)
class Reading:
    """Totals since the members started."""

    stages: Mapping[str, float]
    """Seconds of requests by stage, over all routers."""
    expert_tokens: Mapping[str, Counts]
    """Role -> counts over all of its ranks; empty without groups."""
    waited_s: Mapping[str, float]
    """Rank -> seconds in which it had work and waited for its peers between steps."""
    requests: Mapping[str, float]
    """Rank -> requests that it has had to the end."""
    imbalance: Mapping[str, Mapping[str, float]]
    """Role -> layer -> what its ranks say: the busiest rank over the mean, of all their tokens, where experts are now; mean over ranks."""
    moves: Mapping[str, float]
    """Role -> placements of layers since the first, on each rank."""
    awaited: Mapping[str, float]
    """Role -> layers whose next placement is decided and not in force, on the rank that has most."""

    @property
    def is_settled(self) -> bool:
        """Whether experts of every role have moved, and none is about to."""
        return bool(self.moves) and all(self.moves.values()) and not any(self.awaited.values())


def read(folder: pathlib.Path) -> Reading:
    """`folder`: of the cluster, .baton/<name>."""
    stages: collections.Counter[str] = collections.Counter()
    tokens: dict[str, collections.Counter[tuple[str, str]]] = collections.defaultdict(collections.Counter)
    waited: dict[str, float] = {}
    requests: dict[str, float] = collections.defaultdict(float)
    uneven: dict[str, dict[str, list[float]]] = collections.defaultdict(lambda: collections.defaultdict(list))
    awaited: dict[str, float] = collections.defaultdict(float)
    moves: dict[str, dict[str, float]] = collections.defaultdict(lambda: collections.defaultdict(float))
    for role, member, address in _targets(folder):
        text = httpx.get(f"http://{address}/metrics", trust_env=False, timeout=60).text
        for family in text_string_to_metric_families(text):
            if family.name == f"baton_{role}_requests" and role != "router":
                requests[member] += 0.0  # the one that has had none has no sample
            for sample in family.samples:
                if sample.name == "baton_router_stage_seconds_sum":
                    stages[sample.labels["stage"]] += sample.value
                elif sample.name == f"baton_{role}_expert_tokens_total":
                    tokens[role][sample.labels["layer"], sample.labels["expert"]] += sample.value
                elif sample.name == f"baton_{role}_group_wait_seconds":
                    waited[member] = sample.value
                elif role != "router" and sample.name == f"baton_{role}_requests_total" and sample.labels["outcome"] != "refused":
                    requests[member] += sample.value
                elif sample.name == f"baton_{role}_expert_imbalance":
                    uneven[role][sample.labels["layer"]].append(sample.value)
                elif sample.name == f"baton_{role}_expert_moves_awaited":
                    awaited[role] = max(awaited[role], sample.value)
                elif sample.name == f"baton_{role}_expert_moves_total":
                    moves[role][member] += sample.value
    counts = {role: dict(found) for role, found in tokens.items()}
    imbalance = {role: {layer: _mean(values) for layer, values in found.items()} for role, found in uneven.items()}
    most_moves = {role: max(found.values()) for role, found in moves.items()}
    return Reading(dict(stages), counts, waited, dict(requests), imbalance, most_moves, dict(awaited))


def _targets(folder: pathlib.Path) -> Iterator[tuple[str, str, str]]:
    """(role, member, host:port)."""
    for entry in json.loads((folder / "metrics_targets.json").read_text()):
        member = entry["labels"]["member"]
        for address in entry["targets"]:
            yield member.partition("/")[0], member, address


def stages_between(before: Reading, after: Reading) -> dict[str, float]:
    return {stage: total - before.stages.get(stage, 0.0) for stage, total in after.stages.items()}


Routing = dict[str, Any]
"""`layers`: by layer as well as in the mean."""
MEASURES = ("busiest expert", "busiest rank", "as placed", "used")


def routing_between(before: Reading, after: Reading, ranks: Mapping[str, int]) -> dict[str, Routing]:
    """How evenly experts were used, by role: of each layer, and means over layers. `ranks`: of a group of each role.

    busiest expert    its tokens over the mean
    busiest rank      the tokens of its experts over the mean, where each rank holds the experts that it started with
    as placed         the same of all tokens since the start, where the experts are at the end
    used              share of the experts that had any token
    moves             placements of layers, since the start
    """
    found = {}
    for role, counts in after.expert_tokens.items():
        rows: dict[str, list[float]] = collections.defaultdict(list)
        for (layer, expert), total in sorted(counts.items(), key=lambda item: int(item[0][1])):
            rows[layer].append(total - before.expert_tokens.get(role, {}).get((layer, expert), 0.0))
        busy = {layer: row for layer, row in rows.items() if sum(row)}
        if not busy:
            continue
        layers = {layer: _evenness(row, ranks[role], after.imbalance.get(role, {}).get(layer, 1.0)) for layer, row in busy.items()}
        means = {name: _mean([one[name] for one in layers.values()]) for name in MEASURES}
        found[role] = means | {"moves": after.moves.get(role, 0.0), "layers": layers}
    return found


def _evenness(row: list[float], size: int, as_placed: float) -> dict[str, float]:
    """Of a layer's tokens by expert."""
    shares = [sum(row[rank * len(row) // size : (rank + 1) * len(row) // size]) for rank in range(size)]
    figures = max(row) * len(row) / sum(row), max(shares) * size / sum(shares), as_placed, sum(count > 0 for count in row) / len(row)
    return dict(zip(MEASURES, figures, strict=True))


def waits_between(before: Reading, after: Reading, seconds: float) -> dict[str, float]:
    """Rank -> share of the time that it waited for its peers between steps."""
    return {rank: (total - before.waited_s.get(rank, 0.0)) / seconds for rank, total in after.waited_s.items()}


def requests_between(before: Reading, after: Reading) -> dict[str, float]:
    """Rank -> requests. With attention_tp ranks that follow are among those that have none."""
    return {rank: total - before.requests.get(rank, 0.0) for rank, total in after.requests.items()}


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)

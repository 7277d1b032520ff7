"""What the members of a running cluster say of themselves, summed up for a benchmark."""

from __future__ import annotations

import collections
import json
import pathlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

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
    imbalance: Mapping[str, float]
    """Role -> what its ranks say: the busiest rank over the mean, of all their tokens, where experts are now; mean over layers."""
    moves: Mapping[str, float]
    """Role -> placements of layers since the first, on each rank."""


def read(folder: pathlib.Path) -> Reading:
    """`folder`: of the cluster, .baton/<name>."""
    stages: collections.Counter[str] = collections.Counter()
    tokens: dict[str, collections.Counter[tuple[str, str]]] = collections.defaultdict(collections.Counter)
    waited: dict[str, float] = {}
    uneven: dict[str, list[float]] = collections.defaultdict(list)
    moves: dict[str, dict[str, float]] = collections.defaultdict(lambda: collections.defaultdict(float))
    for role, member, address in _targets(folder):
        text = httpx.get(f"http://{address}/metrics", trust_env=False, timeout=60).text
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name == "baton_router_stage_seconds_sum":
                    stages[sample.labels["stage"]] += sample.value
                elif sample.name == f"baton_{role}_expert_tokens_total":
                    tokens[role][sample.labels["layer"], sample.labels["expert"]] += sample.value
                elif sample.name == f"baton_{role}_group_wait_seconds":
                    waited[member] = sample.value
                elif sample.name == f"baton_{role}_expert_imbalance":
                    uneven[role].append(sample.value)
                elif sample.name == f"baton_{role}_expert_moves_total":
                    moves[role][member] += sample.value
    counts = {role: dict(found) for role, found in tokens.items()}
    imbalance = {role: _mean(values) for role, values in uneven.items()}
    return Reading(dict(stages), counts, waited, imbalance, {role: max(found.values()) for role, found in moves.items()})


def _targets(folder: pathlib.Path) -> Iterator[tuple[str, str, str]]:
    """(role, member, host:port)."""
    for entry in json.loads((folder / "metrics_targets.json").read_text()):
        member = entry["labels"]["member"]
        for address in entry["targets"]:
            yield member.partition("/")[0], member, address


def stages_between(before: Reading, after: Reading) -> dict[str, float]:
    return {stage: total - before.stages.get(stage, 0.0) for stage, total in after.stages.items()}


def routing_between(before: Reading, after: Reading, ranks: Mapping[str, int]) -> dict[str, dict[str, float]]:
    """How evenly experts were used, by role: means over layers. `ranks`: of a group of each role.

    busiest expert    its tokens over the mean
    busiest rank      the tokens of its experts over the mean, where each rank holds the experts that it started with
    as placed         the same of all tokens since the start, where the experts are at the end
    used              share of the experts that had any token
    moves             placements of layers
    """
    found = {}
    for role, counts in after.expert_tokens.items():
        layers: dict[str, list[float]] = collections.defaultdict(list)
        for (layer, expert), total in sorted(counts.items(), key=lambda item: int(item[0][1])):
            layers[layer].append(total - before.expert_tokens.get(role, {}).get((layer, expert), 0.0))
        busy = [row for row in layers.values() if sum(row)]
        if not busy:
            continue
        size = ranks[role]
        shares = [[sum(row[rank * len(row) // size : (rank + 1) * len(row) // size]) for rank in range(size)] for row in busy]
        found[role] = {
            "busiest expert": _mean([max(row) * len(row) / sum(row) for row in busy]),
            "busiest rank": _mean([max(share) * size / sum(share) for share in shares]),
            "as placed": after.imbalance.get(role, 1.0),
            "used": _mean([sum(count > 0 for count in row) / len(row) for row in busy]),
            "moves": after.moves.get(role, 0.0) - before.moves.get(role, 0.0),
        }
    return found


def waits_between(before: Reading, after: Reading, seconds: float) -> dict[str, float]:
    """Rank -> share of the time that it waited for its peers between steps."""
    return {rank: (total - before.waited_s.get(rank, 0.0)) / seconds for rank, total in after.waited_s.items()}


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)

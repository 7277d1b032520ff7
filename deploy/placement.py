"""Which nodes the ranks of one replica go to. Pure.

    plan_replica(config, ranks=8, nodes=nodes, used=used) -> Plan(nodes=(n0, n0, n0, n0, n1, n1, n1, n1))

Ray keeps the books (a placement group holds the resources); this decides where, so that a replica lies inside one NVLink domain,
fills nodes before opening new ones, and a replica that no node can take is refused with the reason instead of staying pending.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from core.errors import ConfigError
from deploy.config import PlacementConfig


class Unplaceable(ConfigError):
    """No set of nodes has room for the replica; the message says what is missing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """A live Ray node."""

    node_id: str
    address: str
    cpus: float
    """In total, whether used or not."""
    gpus: int
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    nodes: tuple[str, ...]
    """Node id of each rank, in order."""


def plan_replica(config: PlacementConfig, ranks: int, nodes: Sequence[Node], used: Mapping[str, int]) -> Plan:
    """Place `ranks` ranks. `used`: node id -> ranks of this cluster that are there already. Raises Unplaceable."""
    labelled = [node for node in nodes if all(node.labels.get(key) == value for key, value in config.node_labels.items())]
    room = {node.node_id: max(_capacity(config, node) - used.get(node.node_id, 0), 0) for node in labelled}
    domains: dict[str, list[Node]] = defaultdict(list)
    for node in labelled:
        domains[node.labels.get(config.nvlink_domain_label, "") if config.nvlink_domain_label else ""].append(node)
    if config.nvlink_domain_label and config.one_nvlink_domain:
        domains.pop("", None)  # a node without the label is in no domain
    sizes = {domain: sum(room[node.node_id] for node in members) for domain, members in domains.items()}
    fitting = [domain for domain, size in sizes.items() if size >= ranks]
    if fitting:
        # The tightest domain that fits: large holes stay whole for large replicas.
        domain = min(fitting, key=lambda name: (sizes[name], name))
        return Plan(nodes=_fill(ranks, domains[domain], room))
    may_span = not (config.nvlink_domain_label and config.one_nvlink_domain)
    if may_span and sum(sizes.values()) >= ranks:
        return Plan(nodes=_fill(ranks, [node for name in sorted(domains) for node in domains[name]], room))
    raise Unplaceable(_why_not(config, ranks, len(nodes), len(labelled), sizes))


def _capacity(config: PlacementConfig, node: Node) -> int:
    """Ranks that fit on an empty node."""
    by_cpu = int(node.cpus / config.cpus_per_rank + 1e-9)
    return min(by_cpu, node.gpus) if config.gpus_per_rank else by_cpu


def _fill(ranks: int, nodes: Sequence[Node], room: Mapping[str, int]) -> tuple[str, ...]:
    """The fewest nodes: one that takes all the rest (the fullest such), else the emptiest one, and on."""
    left, chosen = ranks, Counter[str]()
    order = list(nodes)
    placed: list[str] = []
    while left:
        free = [(room[node.node_id] - chosen[node.node_id], node) for node in order]
        whole = [entry for entry in free if entry[0] >= left]
        size, node = min(whole, key=lambda e: e[0]) if whole else max(free, key=lambda e: e[0])
        take = min(size, left)
        chosen[node.node_id] += take
        placed += [node.node_id] * take
        left -= take
    return tuple(placed)


def _why_not(config: PlacementConfig, ranks: int, num_nodes: int, num_labelled: int, sizes: Mapping[str, int]) -> str:
    need = (
        f"{ranks} rank{'s' if ranks > 1 else ''} of {config.cpus_per_rank:g} CPU" + (" and 1 GPU" if config.gpus_per_rank else "") + " each"
    )
    if not num_nodes:
        return f"no room for {need}: Ray has no live node"
    if not num_labelled:
        wanted = ", ".join(f"{key}={value}" for key, value in config.node_labels.items())
        return f"no room for {need}: none of {num_nodes} nodes has the labels {wanted} (placement.node_labels)"
    if config.nvlink_domain_label and config.one_nvlink_domain:
        if not sizes:
            return f"no room for {need}: no node has the label {config.nvlink_domain_label} (placement.nvlink_domain_label)"
        best = max(sizes, key=lambda name: sizes[name])
        return f"no room for {need} in one NVLink domain: the emptiest of {len(sizes)}, {best}, has room for {sizes[best]}"
    return f"no room for {need}: {num_labelled} node{'s' * (num_labelled != 1)} with room for {sum(sizes.values())}"

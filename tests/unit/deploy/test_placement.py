"""Placement on pretend nodes, GB300 racks among them (18 nodes of 4 GPUs in one NVLink domain)."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from deploy.config import PlacementConfig
from deploy.placement import Node, Plan, Unplaceable, plan_replica

RACKED = PlacementConfig(gpus_per_rank=1, cpus_per_rank=8, nvlink_domain_label="rack")


def gb300(racks: int) -> list[Node]:
    return [
        Node(node_id=f"r{r}n{n:02}", address=f"10.0.{r}.{n}", cpus=144, gpus=4, labels={"rack": f"r{r}", "zone": "a"})
        for r in range(racks)
        for n in range(18)
    ]


def racks_of(plan: Plan, nodes: list[Node]) -> set[str]:
    return {node.labels["rack"] for node in nodes if node.node_id in plan.nodes}


def test_a_wide_decode_replica_stays_in_one_rack() -> None:
    plan = plan_replica(RACKED, 40, gb300(3), {})
    assert len(racks_of(plan, gb300(3))) == 1
    assert set(Counter(plan.nodes).values()) == {4} and len(set(plan.nodes)) == 10


def test_prefill_replicas_fill_nodes_one_by_one() -> None:
    used: Counter[str] = Counter()
    nodes = gb300(1)
    for _ in range(18):
        plan = plan_replica(RACKED, 4, nodes, used)
        assert len(set(plan.nodes)) == 1
        used.update(plan.nodes)
    assert set(used.values()) == {4}
    with pytest.raises(Unplaceable, match=r"4 ranks of 8 CPU and 1 GPU each in one NVLink domain: the emptiest of 1, r0, has room for 0"):
        plan_replica(RACKED, 4, nodes, used)


def test_small_replicas_go_to_the_tightest_rack_so_that_large_ones_still_fit() -> None:
    nodes = gb300(1) + [Node(node_id=f"s{n}", address="", cpus=144, gpus=4, labels={"rack": "small"}) for n in range(2)]
    assert racks_of(plan_replica(RACKED, 4, nodes, {}), nodes) == {"small"}
    assert racks_of(plan_replica(RACKED, 72, nodes, {}), nodes) == {"r0"}


def test_a_replica_larger_than_any_domain_is_refused_or_spans() -> None:
    with pytest.raises(Unplaceable, match=r"80 ranks .* in one NVLink domain: the emptiest of 2, r0, has room for 72"):
        plan_replica(RACKED, 80, gb300(2), {})
    loose = PlacementConfig(gpus_per_rank=1, cpus_per_rank=8, nvlink_domain_label="rack", one_nvlink_domain=False)
    plan = plan_replica(loose, 80, gb300(2), {})
    assert len(plan.nodes) == 80 and racks_of(plan, gb300(2)) == {"r0", "r1"}
    assert racks_of(plan_replica(loose, 8, gb300(2), {}), gb300(2)) == {"r0"}


def test_labels_select_nodes() -> None:
    config = PlacementConfig(node_labels={"zone": "b"})
    with pytest.raises(Unplaceable, match=r"none of 18 nodes has the labels zone=b"):
        plan_replica(config, 1, gb300(1), {})
    with pytest.raises(Unplaceable, match="no node has the label rack"):
        plan_replica(RACKED, 1, [Node(node_id="n", address="", cpus=64, gpus=8)], {})
    with pytest.raises(Unplaceable, match="Ray has no live node"):
        plan_replica(RACKED, 1, [], {})


def test_fractions_of_a_core_add_up() -> None:
    config, node = PlacementConfig(cpus_per_rank=0.1), Node(node_id="n", address="", cpus=1, gpus=0)
    assert plan_replica(config, 10, [node], {}).nodes == ("n",) * 10
    with pytest.raises(Unplaceable, match="1 node with room for 10"):
        plan_replica(config, 11, [node], {})


@pytest.mark.parametrize("seed", range(200))
def test_no_node_ever_holds_more_than_it_has(seed: int) -> None:
    rng = random.Random(seed)
    nodes = [
        Node(node_id=f"n{i}", address="", cpus=rng.choice([1, 8, 64]), gpus=rng.choice([0, 4, 8]), labels={"rack": rng.choice("abc")})
        for i in range(rng.randint(1, 12))
    ]
    config = PlacementConfig(
        gpus_per_rank=rng.choice([0, 1]),
        cpus_per_rank=rng.choice([0.25, 1, 4]),
        nvlink_domain_label=rng.choice(["", "rack"]),
        one_nvlink_domain=rng.random() < 0.5,
    )
    used: Counter[str] = Counter()
    for _ in range(12):
        ranks = rng.randint(1, 10)
        try:
            plan = plan_replica(config, ranks, nodes, used)
        except Unplaceable:
            continue
        assert len(plan.nodes) == ranks
        assert len(racks_of(plan, nodes)) == 1 or not (config.nvlink_domain_label and config.one_nvlink_domain)
        used.update(plan.nodes)
    for node in nodes:
        assert used[node.node_id] * config.cpus_per_rank <= node.cpus
        assert config.gpus_per_rank == 0 or used[node.node_id] <= node.gpus

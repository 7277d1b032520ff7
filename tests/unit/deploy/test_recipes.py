"""The cluster files of the GB300 recipes: each loads, fits into its GPUs' memory, and is placed on as many pretend nodes as it needs."""

from __future__ import annotations

import collections
import functools
import math
import pathlib
import re

import pytest

from deploy.placement import Node, Plan, Unplaceable, plan_replica
from deploy.spec import ClusterSpec, load_spec
from engine.cache.layout import build_layout
from engine.config import ModelConfig
from engine.histories import history_bytes
from engine.model.weights import expected_tensors, published_format
from engine.parallel.expert_placement import even_placement

FOLDER = pathlib.Path(__file__).resolve().parents[3] / "deploy/clusters/gb300"
RECIPES = sorted(FOLDER.glob("*.yaml"))
GPUS_PER_NODE = 4
GPU_BYTES = 288e9
BYTES_PER_VALUE = {"mxfp4": 1 / 2 + 1 / 32, "fp8": 1 + 1 / 128**2, "bf16": 2, "fp32": 4, "int64": 8}

SIZES = {
    "gb300_p1_d4": (1, 1, 4),
    "gb300_p1_d16": (1, 1, 16),
    "gb300_p8_d40": (8, 1, 40),
    "gb300_p10_d32": (10, 1, 32),
    "gb300_p12_d24": (12, 1, 24),
    "gb300_p14_d16": (14, 1, 16),
    "gb300_p15_d12": (15, 1, 12),
    "gb300_p1_6xd4_mtp3": (1, 6, 4),
    "gb300_p1_d8_mtp3": (1, 1, 8),
    "gb300_p1_d16_mtp3": (1, 1, 16),
    "gb300_p2_d8_mtp3": (2, 1, 8),
    "gb300_p4_d8_mtp3": (4, 1, 8),
    "gb300_p6_d8_mtp2": (6, 1, 8),
    "gb300_p8_d8_mtp1": (8, 1, 8),
}
"""Prefill groups, decode groups, GPUs of a decode group."""


def nodes(count: int, domain: str = "rack-0") -> list[Node]:
    return [
        Node(node_id=f"{domain}/{i}", address=f"10.0.0.{i}", cpus=144, gpus=GPUS_PER_NODE, labels={"nvl_domain": domain})
        for i in range(count)
    ]


def placed(spec: ClusterSpec, machines: list[Node]) -> list[Plan]:
    """Every replica of the file, one after the other, as the controller places them."""
    used: collections.Counter[str] = collections.Counter()
    plans = []
    for role in ("prefill", "decode"):
        for _ in range(spec.replicas(role)):
            plans.append(plan_replica(spec.placement, spec.ranks_per_replica(role), machines, used))
            used.update(plans[-1].nodes)
    return plans


def test_there_is_one_file_for_each_recipe() -> None:
    assert {path.stem for path in RECIPES} == set(SIZES)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_placed_on_as_many_nodes_as_it_needs_and_no_fewer(path: pathlib.Path) -> None:
    spec = load_spec(path)
    prefills, decodes, gpus = SIZES[path.stem]
    assert (spec.prefill.replicas, spec.decode.replicas, spec.ranks_per_replica("decode")) == (prefills, decodes, gpus)
    count = (4 * prefills + decodes * gpus) // GPUS_PER_NODE
    assert count <= 18, "more than one NVL72"
    plans = placed(spec, nodes(count))
    on_node = collections.Counter(node for plan in plans for node in plan.nodes)
    assert set(on_node.values()) == {GPUS_PER_NODE} and len(on_node) == count
    assert all(len(set(plan.nodes)) == len(plan.nodes) // GPUS_PER_NODE for plan in plans)
    with pytest.raises(Unplaceable):
        placed(spec, nodes(count - 1))
    if gpus > GPUS_PER_NODE:  # a decode group lies inside one NVLink domain or nowhere
        halves = [*nodes(gpus // GPUS_PER_NODE - 1), *nodes(gpus // GPUS_PER_NODE - 1, "rack-1")]
        with pytest.raises(Unplaceable, match="in one NVLink domain"):
            plan_replica(spec.placement, gpus, halves, {})


@functools.cache
def weight_bytes(folder: pathlib.Path) -> tuple[float, float]:
    """Of the routed experts, and of everything else."""
    experts = rest = 0.0
    for name, tensor in expected_tensors(ModelConfig.from_folder(folder)).items():
        size = math.prod(tensor.shape) * BYTES_PER_VALUE[published_format(name)]
        experts, rest = (experts + size, rest) if ".ffn.experts." in name else (experts, rest + size)
    return experts, rest


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_fits_into_the_memory_of_its_gpus(path: pathlib.Path) -> None:
    spec = load_spec(path)
    decode_share = int(re.findall(r"(\d+)% of 288 GB", path.read_text())[0]) / 100
    model = ModelConfig.from_folder(spec.model_path)
    layout = build_layout(model, spec.engine, "m")
    experts, rest = weight_bytes(spec.model_path)
    for role, section, share in (("prefill", spec.prefill, 0.9), ("decode", spec.decode, decode_share)):
        held = even_placement(model.n_routed_experts, section.ranks_per_replica, section.redundant_experts).slots_per_rank
        weights = rest + experts * held / model.n_routed_experts
        caches = section.num_pages * layout.page_bytes + section.num_slots * (layout.slot_bytes + history_bytes(model.vocab_size))
        assert weights + caches <= share * GPU_BYTES, f"{role}: {weights / 1e9:.0f} + {caches / 1e9:.0f} GB"

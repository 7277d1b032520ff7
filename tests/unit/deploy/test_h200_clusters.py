"""The cluster files for one host of H200s: each loads and is placed on the GPUs that its comment names; weights leave room for pages."""

from __future__ import annotations

import collections
import math
import pathlib
import re

import pytest

from core.errors import ConfigError
from core.kv_layout import PAGE_TOKENS
from deploy.placement import Node, Unplaceable, plan_replica
from deploy.spec import check_files, load_spec
from engine.cache.layout import build_layout
from engine.config import ModelConfig
from engine.histories import history_bytes
from engine.model.weights import expected_tensors, published_format
from engine.parallel.expert_placement import even_placement

FOLDER = pathlib.Path(__file__).resolve().parents[3] / "deploy/clusters"
FILES = sorted(FOLDER.glob("h200*.yaml"))
GPU_BYTES = 141e9
LONGEST = 8192 + 1024
BYTES_PER_VALUE = {"mxfp4": 1 / 2 + 1 / 32, "fp8": 1 + 1 / 128**2, "bf16": 2, "fp32": 4, "int64": 8}


def test_there_is_a_file_for_four_gpus() -> None:
    assert "h200_flash_1p1d" in {path.stem for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_its_groups_take_four_gpus_of_one_host_and_no_fewer(path: pathlib.Path) -> None:
    spec = load_spec(path)
    assert "four H200s" in path.read_text().splitlines()[0]
    for gpus, fits in ((4, True), (3, False)):
        host = [Node(node_id="host", address="127.0.0.1", cpus=16, gpus=gpus)]
        used: collections.Counter[str] = collections.Counter()
        used.update(plan_replica(spec.placement, spec.ranks_per_replica("prefill"), host, used).nodes)
        if fits:
            used.update(plan_replica(spec.placement, spec.ranks_per_replica("decode"), host, used).nodes)
            assert used == {"host": 4}
        else:
            with pytest.raises(Unplaceable):
                plan_replica(spec.placement, spec.ranks_per_replica("decode"), host, used)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_what_memory_is_left_holds_every_running_sequence(path: pathlib.Path) -> None:
    spec = load_spec(path)
    model = ModelConfig.from_folder(spec.model_path)
    layout = build_layout(model, spec.engine, "m")
    experts = rest = 0.0
    for name, tensor in expected_tensors(model).items():
        size = math.prod(tensor.shape) * BYTES_PER_VALUE[published_format(name)]
        experts, rest = (experts + size, rest) if ".ffn.experts." in name else (experts, rest + size)
    for role, section, sequences in (("prefill", spec.prefill, spec.prefill.num_slots), ("decode", spec.decode, spec.decode.max_running)):
        assert section.num_pages == 0, "pages are fitted to the GPU"
        share = even_placement(model.n_routed_experts, section.ranks_per_replica).slots_per_rank / model.n_routed_experts
        weights = rest + experts * share
        said = float(re.findall(r"(\d+) GB a GPU", path.read_text())[0]) * 1e9
        assert weights == pytest.approx(said, rel=0.05), role
        pages = sequences * -(-LONGEST // PAGE_TOKENS) * layout.page_bytes
        slots = section.num_slots * (layout.slot_bytes + history_bytes(model.vocab_size))
        assert weights + pages + slots <= 0.85 * GPU_BYTES, role  # the rest: the largest step, graphs


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_it_can_be_started_as_it_lies_here(path: pathlib.Path) -> None:
    assert check_files(load_spec(path)).num_hidden_layers == 43
    with pytest.raises(ConfigError, match=r"model\.path: .*v4_flash holds no tokenizer\.json; .*model\.tokenizer"):
        check_files(load_spec(path, ["model.tokenizer=''"]))
    with pytest.raises(ConfigError, match=r"model\.tokenizer: /none holds no tokenizer\.json"):
        check_files(load_spec(path, ["model.tokenizer=/none"]))

"""The benchmark of moves on CPU ranks: from skewed to even, with the engine's own count, plan and moves."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest
import torch

from engine.config import EngineConfig
from engine.engine import LoadedModel
from engine.parallel.experts import Sharing
from engine.parallel.group import Group
from tests.benchmarks.bench_moves import AFTER, AGAIN, BEFORE, MOVING, DecodeLoad, MovingRank, PromptLoad, gather_popular
from tests.support.checkpoints import SMALL
from tests.support.ranks import run_group

SHAPE: dict[str, Any] = SMALL | {
    "num_hidden_layers": 1, "compress_ratios": [0, 0], "num_nextn_predict_layers": 0, "vocab_size": 2048, "n_routed_experts": 8,
}  # fmt: skip


def skewed_rank(folder: pathlib.Path, group: Group) -> LoadedModel:
    config = EngineConfig(device="cpu", load="dummy", dummy_skew=1.0, max_model_len=1024, rebalance_interval_s=0.05)
    loaded = LoadedModel.load(folder, config, Sharing(group=group, max_tokens=512, is_latency_bound=True))
    gather_popular(loaded, 2)
    return loaded


def test_a_skewed_group_is_even_after_its_experts_have_moved(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.benchmarks.bench_moves.WARM_UP", 1)
    monkeypatch.setattr("engine.parallel.rebalance.LEAST_LOAD", 100)
    (tmp_path / "config.json").write_text(json.dumps(SHAPE))

    def rank(group: Group) -> list[dict[str, Any]]:
        loaded = skewed_rank(tmp_path, group)
        decode, prompts = DecodeLoad(loaded, group, 2, 512), PromptLoad(loaded, 64)
        decode.leads = True  # as on a GPU: as many steps are timed
        one = MovingRank(loaded, group)
        rows = list(one.measure([prompts, decode], 3, 20.0))
        one.close()
        group.close()
        return rows

    torch.set_num_threads(1)
    rows, others = run_group(2, rank)
    assert rows == others
    assert [row["stage"] for row in rows] == [BEFORE, BEFORE, AGAIN, AGAIN, MOVING, AFTER, AFTER]
    still = [row for row in rows if row["stage"] != MOVING]
    assert [row["steps"] for row in still] == [3] * 6
    assert [row["experts"] for row in still] == [0] * 6 and rows[4]["experts"] >= 2
    before, again, after = (float(still[place]["imbalance"]) for place in (0, 2, 4))
    assert before == again > 1.2 > after, still


def test_the_most_popular_experts_have_the_first_ids_and_others_stay_in_order(tmp_path: pathlib.Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SHAPE | {"num_hash_layers": 1}))
    loaded = LoadedModel.load(tmp_path, EngineConfig(device="cpu", load="dummy", dummy_skew=1.0, max_model_len=1024))
    table = loaded.network._layers[0].moe._table
    assert table is not None
    drawn = table.clone()
    gather_popular(loaded, 3)
    counts = torch.bincount(drawn.flatten(), minlength=8)
    first = counts.argsort(descending=True)[:3].tolist()
    order = [*first, *(expert for expert in range(8) if expert not in first)]
    assert torch.equal(torch.tensor(order)[table], drawn)
    assert torch.bincount(table.flatten(), minlength=8).tolist() == counts[order].tolist()

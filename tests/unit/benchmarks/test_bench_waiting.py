"""The benchmark of waiting on CPU ranks: the same rows on all ranks, and a rank that is held up shows as waiting on the other."""

from __future__ import annotations

import json
import pathlib
import time

import pytest
import torch

from engine.config import EngineConfig
from engine.engine import LoadedModel
from engine.parallel.experts import Sharing
from engine.parallel.group import Group
from tests.benchmarks.bench_waiting import Bench, measure, time_inside
from tests.support.checkpoints import SMALL
from tests.support.ranks import run_group

HELD_UP_S = 0.3


def loaded_rank(folder: pathlib.Path, group: Group) -> LoadedModel:
    sharing = Sharing(group=group, max_tokens=4, is_latency_bound=True)
    loaded = LoadedModel.load(folder, EngineConfig(device="cpu", load="dummy", max_model_len=1024), sharing)
    assert loaded.share is not None
    time_inside(loaded.share)
    return loaded


def test_ranks_agree_and_one_that_is_held_up_keeps_the_other_waiting(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.benchmarks.bench_waiting.REPEATS", 3)
    shape = SMALL | {"num_hidden_layers": 1, "compress_ratios": [0, 0], "num_nextn_predict_layers": 0, "vocab_size": 2048}
    (tmp_path / "config.json").write_text(json.dumps(shape))

    def rank(group: Group) -> tuple[list[dict[str, object]], float]:
        loaded = loaded_rank(tmp_path, group)
        rows = list(measure(loaded, group, [2], 512))
        bench = Bench(loaded, group, 2, 512)
        step = bench.step(is_idle=False)

        def late() -> None:
            time.sleep(HELD_UP_S)
            step()

        return rows, bench.timed(late if group.rank == 0 else step)[1]

    torch.set_num_threads(1)
    (rows, on_time), (others, waiting) = run_group(2, rank)
    assert rows == others
    assert [(row["ranks"], row["batch"]) for row in rows] == [(2, 2)]
    assert waiting >= 1e3 * HELD_UP_S / 2 and waiting > on_time, f"{waiting:.1f} ms, and {on_time:.1f} ms on the rank that was held up"

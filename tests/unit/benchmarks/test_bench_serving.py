"""`make bench` right after `make up` works."""

from __future__ import annotations

import json
import pathlib

from tests.benchmarks.bench_serving import VOCAB

ROOT = pathlib.Path(__file__).resolve().parents[3]


def test_prompts_are_of_ids_that_the_demo_model_has() -> None:
    config = json.loads((ROOT / "deploy/demo_model/checkpoint/config.json").read_text())
    assert 0 <= VOCAB[0] < VOCAB[1] <= config["vocab_size"]

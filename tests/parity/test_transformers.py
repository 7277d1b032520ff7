"""The reference path against transformers' DeepseekV4ForCausalLM in float32, on random weights in published tensor names.

transformers keeps no compressed caches across chunks of its own, so one whole forward of it is the yardstick for every way of
cutting the same tokens here.
"""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import torch

from engine.config import EngineConfig
from engine.engine import LoadedModel
from engine.score import score
from tests.support.checkpoints import TINY, float_tensors, write_random
from tests.support.transformers_model import logits_of, transformers_model

NUM_TOKENS = 600
TOLERANCE = 1e-4
"""Float32 against float64 accumulation over 6 layers; logits reach about 5."""

FLOAT32 = EngineConfig(device="cpu", dtype="float32", kv_format="fp32", index_format="fp32", max_model_len=4096)


@pytest.fixture(scope="module")
def ids() -> list[int]:
    return torch.randint(0, TINY["vocab_size"], (NUM_TOKENS,), generator=torch.Generator().manual_seed(7)).tolist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return write_random(tmp_path_factory.mktemp("tiny"), TINY, quantized=False)


@pytest.fixture(scope="module")
def loaded(folder: pathlib.Path) -> LoadedModel:
    return LoadedModel.load(folder, FLOAT32)


@pytest.fixture(scope="module")
def expected(ids: list[int]) -> np.ndarray:
    return logits_of(transformers_model(TINY, float_tensors(TINY)), ids)


def test_the_random_model_is_not_degenerate(expected: np.ndarray) -> None:
    assert expected.std() > 0.3
    assert np.abs(expected[1:] - expected[:-1]).max() > 1.0


@pytest.mark.parametrize("chunk", [None, 50, 100, 128, 137, 300])
def test_prefill_in_chunks_matches_transformers(loaded: LoadedModel, ids: list[int], expected: np.ndarray, chunk: int | None) -> None:
    assert np.abs(score(loaded, ids, chunk=chunk) - expected).max() <= TOLERANCE


@pytest.mark.parametrize("decode_from", [1, 3, 4, 127, 128, 129, 255, 511])
def test_decode_matches_transformers(loaded: LoadedModel, ids: list[int], expected: np.ndarray, decode_from: int) -> None:
    assert np.abs(score(loaded, ids, decode_from=decode_from) - expected).max() <= TOLERANCE


def test_score_command_writes_the_same_logits(folder: pathlib.Path, ids: list[int], expected: np.ndarray, tmp_path: pathlib.Path) -> None:
    (tmp_path / "ids.json").write_text(json.dumps(ids))
    command = [sys.executable, "-m", "engine", "score", "--model", str(folder), "--ids", str(tmp_path / "ids.json")]
    subprocess.run([*command, "--out", str(tmp_path / "out.npy"), "--dtype", "float32", "--chunk", "128"], check=True)
    assert np.abs(np.load(tmp_path / "out.npy") - expected).max() <= TOLERANCE

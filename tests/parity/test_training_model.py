"""The trainer's differentiable model computes what the engine computes: on random weights, with entries selected, past every window."""

from __future__ import annotations

import pathlib

import numpy as np
import torch

from deploy.demo_model.training_model import TrainingModel
from engine.config import EngineConfig, ModelConfig
from engine.engine import LoadedModel
from engine.score import score
from tests.support.checkpoints import SMALL, random_tensors, write_random

TOLERANCE = 2e-3
"""Float32 sums here against float64 ones in the engine; logits reach about 5."""


def test_logits_of_the_training_model_are_the_engines(tmp_path: pathlib.Path) -> None:
    folder = write_random(tmp_path / "small", SMALL, quantized=False)
    engine = EngineConfig(device="cpu", dtype="float32", kv_format="fp32", index_format="fp32", max_model_len=4096)
    ids = torch.randint(0, SMALL["vocab_size"], (3 * SMALL["sliding_window"],), generator=torch.Generator().manual_seed(3))
    expected = score(LoadedModel.load(folder, engine), ids.tolist())
    model = TrainingModel(ModelConfig.from_dict(SMALL))
    model.load({name: value if value.dtype == torch.int64 else value.float() for name, value in random_tensors(SMALL).items()})
    model.select = True
    with torch.no_grad():
        model.prepare(torch.float32)
        logits, drafted, _ = model(ids[None])
    assert drafted is not None
    assert drafted.shape == (*ids[None].shape, SMALL["vocab_size"])
    difference = np.abs(logits[0].numpy() - expected).max(axis=1)
    assert np.median(difference) <= TOLERANCE
    assert (difference > 0.05).mean() < 0.02, "a few rows may choose other entries or experts on a near tie, not many"

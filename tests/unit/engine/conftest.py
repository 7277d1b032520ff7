"""The small checkpoint, written once for all tests of a module."""

from __future__ import annotations

import pathlib

import pytest
import torch

from engine.model.checkpoint_writer import write_checkpoint
from tests.support.checkpoints import random_tensors
from tests.support.small_checkpoint import SMALLEST


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    return random_tensors(SMALLEST)


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, torch.Tensor]) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("single")
    write_checkpoint(folder, SMALLEST, tensors)
    return folder


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, torch.Tensor]) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("sharded")
    write_checkpoint(folder, SMALLEST, tensors, max_shard_bytes=50_000)
    return folder

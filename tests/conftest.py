"""What every test may rely on: devices or a reason to skip, and a seed that is printed when a test fails."""

from __future__ import annotations

import os
import pathlib
import random
import zlib

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
"""Set before torch is first imported, here and in the processes that tests start: threads that wait for each other on shared cores
make small tensors many times slower."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--run-slow", action="store_true", help="also run tests marked slow")
    parser.addoption("--seed", type=int, default=None, help="seed of the `rng` fixture, as a failing test printed it")


def _num_cuda_devices() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted = {name for item in items for name in ("gpu", "multi_gpu") if item.get_closest_marker(name)}
    num_devices = _num_cuda_devices() if wanted else 0
    for item in items:
        for name, least in (("gpu", 1), ("multi_gpu", 2)):
            if item.get_closest_marker(name) and num_devices < least:
                item.add_marker(pytest.mark.skip(reason=f"needs {least} CUDA device(s); torch finds {num_devices} here"))
        if item.get_closest_marker("slow") and not config.getoption("--run-slow"):
            item.add_marker(pytest.mark.skip(reason="slow; run with --run-slow"))


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> random.Random:
    """A generator seeded by the test's name, or by --seed. The seed is among the captured output of a failing test."""
    wanted = request.config.getoption("--seed")
    seed = zlib.crc32(request.node.nodeid.encode()) if wanted is None else wanted
    print(f"rng seed: {seed} (repeat with --seed {seed})")
    return random.Random(seed)


@pytest.fixture(scope="session")
def small_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """`SMALL` with random weights in the published formats (MXFP4 experts, FP8 linears): every layer type, head_dim 512, MTP."""
    from tests.support.checkpoints import SMALL, write_random

    return write_random(tmp_path_factory.mktemp("small"), SMALL, quantized=True)

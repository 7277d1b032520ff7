"""Clusters that end before their time, or never begin: the reason is said, nothing stays, and the next start is clean."""

from __future__ import annotations

import pathlib
import shutil
import socket

import pytest

from deploy.folder import processes_of
from tests.support.cluster import MODEL, Cluster, kill, rank_processes_of

pytestmark = pytest.mark.e2e


def test_a_cluster_whose_keeper_was_killed_ends_and_can_be_started_again(tmp_path: pathlib.Path) -> None:
    other = Cluster(tmp_path, "second")
    try:
        other.up()
        state = other.state
        kill(state.keeper_pid)
        other.wait(lambda: not rank_processes_of(state.marker), "the ranks and the router have ended", 30)
        other.up()
        assert processes_of(state.marker) == []  # Ray's agents are slower to notice; starting again swept them away
        assert not pathlib.Path(state.ray_dir).exists()
        assert "".join(other.complete("Hello", 5))
    finally:
        other.down()


def test_a_start_that_fails_says_why_and_leaves_nothing(tmp_path: pathlib.Path) -> None:
    model = tmp_path / "broken model"
    shutil.copytree(MODEL, model)
    shard = next(model.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1000])
    broken = Cluster(tmp_path, "broken", model)
    try:
        output = broken.baton("up", str(broken.file), expect=1)
        assert shard.name in output and "starting" not in output, output
        shutil.copy(MODEL / shard.name, shard)
        output = broken.baton("up", str(broken.file), "engine.ops={sample: triton}", expect=1)  # which no check before a start knows
        assert "engine.ops" in output and "triton" in output and "taking down what was started" in output, output
        assert broken.folder.read() is None
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            output = broken.baton("up", str(broken.file), f"router.port={taken.getsockname()[1]}", expect=1)
            assert "router.port: 127.0.0.1:" in output and "cannot be had" in output, output
    finally:
        broken.down()

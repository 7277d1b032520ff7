"""`baton up` and `down` where things go wrong half-way, without Ray."""

from __future__ import annotations

import pathlib
import socket
import types
from typing import Any

import pytest

from core.errors import Unavailable
from deploy import existing, lifecycle
from deploy.client import NotOurs
from deploy.folder import ClusterFolder, ClusterState, new_secret
from deploy.spec import ClusterSpec, load_spec

LOCAL_CPU = pathlib.Path(__file__).resolve().parents[3] / "deploy/clusters/local_cpu.yaml"
STATE = ClusterState(marker="m", keeper_pid=1, control_address="127.0.0.1:1", ray_dir="/nowhere")


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> ClusterFolder:
    found = ClusterFolder(tmp_path, "local_cpu")
    found.logs.mkdir(parents=True)
    new_secret(found.control_token_path)
    return found


class Ended:
    """A keeper that has ended."""

    def poll(self) -> int:
        return 1


@pytest.mark.parametrize(("last_words", "num_tries"), [(f"Exception: {lifecycle.RAY_WAS_LATE}. This", 3), ("OSError: no space left", 1)])
def test_a_ray_that_was_late_is_started_again_and_no_other(
    last_words: str, num_tries: int, folder: ClusterFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries, ended = list[pathlib.Path](), list[str]()

    def launch(folder: ClusterFolder, spec: ClusterSpec, ray_dir: pathlib.Path) -> tuple[Ended, ClusterState]:
        assert not ray_dir.exists(), "what the try before left is gone"
        ray_dir.mkdir()
        folder.keeper_log.write_text(f"Traceback\n{last_words}\n")
        tries.append(ray_dir)
        return Ended(), STATE

    monkeypatch.setattr(lifecycle, "launch", launch)
    monkeypatch.setattr(lifecycle, "choose_ray_dir", lambda folder: folder.path / "ray")
    monkeypatch.setattr(lifecycle, "end_processes", lambda marker, *_: ended.append(marker))
    with pytest.raises(Unavailable, match=f"did not start: {last_words.partition('.')[0]}"):
        lifecycle.start(folder, load_spec(LOCAL_CPU), lambda line: None)
    assert len(tries) == num_tries and len(ended) == num_tries - 1


class Controller:
    """Answers after it was asked so often."""

    def __init__(self, num_silent: int) -> None:
        self.num_silent = num_silent

    def client(self, address: str, token: str) -> Any:
        return self

    def __enter__(self) -> Controller:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def status(self) -> Any:
        self.num_silent -= 1
        if self.num_silent >= 0:
            raise Unavailable("the controller at 127.0.0.1:1 does not answer (UNAVAILABLE)")
        return types.SimpleNamespace(name="local_cpu")


def test_up_waits_for_a_controller_that_is_being_restarted_and_ends_nothing(folder: ClusterFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.write(STATE)
    said = list[str]()
    monkeypatch.setattr(lifecycle, "has_keeper", lambda state: True)
    monkeypatch.setattr(lifecycle, "ControlClient", Controller(2).client)
    monkeypatch.setattr(lifecycle.time, "sleep", lambda seconds: None)
    assert lifecycle.is_running(folder, said.append)
    assert said == ["local_cpu was started before; waiting for its controller"]
    monkeypatch.setattr(lifecycle, "KEEPER_TIMEOUT_S", 0.0)
    monkeypatch.setattr(lifecycle, "ControlClient", Controller(2).client)
    with pytest.raises(Unavailable, match="`baton down -n local_cpu` ends what there is"):
        lifecycle.is_running(folder, said.append)


def test_a_cluster_whose_keeper_ends_meanwhile_has_ended(folder: ClusterFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.write(STATE)
    answers = iter([True, True, False])
    monkeypatch.setattr(lifecycle, "has_keeper", lambda state: next(answers))
    monkeypatch.setattr(lifecycle, "ControlClient", Controller(1_000).client)
    monkeypatch.setattr(lifecycle.time, "sleep", lambda seconds: None)
    assert not lifecycle.is_running(folder, lambda line: None)


def test_waiting_ends_with_the_keeper(folder: ClusterFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.write(STATE)
    folder.keeper_log.write_text("Killed\n")
    answers = iter([True, True, False])
    monkeypatch.setattr(lifecycle, "has_keeper", lambda state: next(answers))
    monkeypatch.setattr(lifecycle, "ControlClient", Controller(1_000).client)
    monkeypatch.setattr(lifecycle.time, "sleep", lambda seconds: None)
    with pytest.raises(Unavailable, match="the keeper of local_cpu has ended: Killed"):
        lifecycle.wait_until_settled(folder, 900.0, lambda line: None)


def on_no_ray(folder: ClusterFolder) -> ClusterSpec:
    """Of a cluster on a Ray that does not answer."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return load_spec(LOCAL_CPU, [f"placement.ray=127.0.0.1:{unused.getsockname()[1]}"])


def test_a_start_on_a_ray_that_is_not_there_says_so_at_once_and_leaves_nothing(folder: ClusterFolder) -> None:
    spec = on_no_ray(folder)
    with pytest.raises(Unavailable, match=f"placement.ray: no Ray cluster answers at {spec.placement.ray}"):
        existing.start(folder, spec)
    assert folder.read() is None and not folder.spec_path.exists()


def test_down_says_what_to_do_where_controller_and_ray_are_gone(folder: ClusterFolder) -> None:
    spec = on_no_ray(folder)
    folder.spec_path.write_text(spec.to_yaml())
    folder.write(ClusterState(marker="", keeper_pid=0, control_address="127.0.0.1:1", ray_dir=""))
    with pytest.raises(Unavailable, match=f"no Ray cluster answers.*has ended for good, remove {folder.path}/cluster.json"):
        lifecycle.stop(folder)
    assert folder.read() is not None


@pytest.mark.parametrize("is_ours", [True, False])
def test_only_ones_own_cluster_is_ended_through_ray(is_ours: bool, folder: ClusterFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.write(ClusterState(marker="", keeper_pid=0, control_address="127.0.0.1:1", ray_dir=""))

    def shut_down(*_: Any) -> None:
        raise Unavailable("does not answer") if is_ours else NotOurs("is another's")

    monkeypatch.setattr(lifecycle, "_shut_down", shut_down)
    monkeypatch.setattr(existing, "end", lambda folder: 3)
    remarks = lifecycle.stop(folder)
    assert (remarks[1:] == ["3 actors were ended through Ray"]) == is_ours and len(remarks) == 1 + is_ours
    assert folder.read() is None


@pytest.mark.parametrize("is_there", [False, True])
def test_up_waits_as_long_as_a_replica_may_look_for_a_place_and_then_start(
    is_there: bool, folder: ClusterFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited = list[float]()
    monkeypatch.setattr(lifecycle, "check_files", lambda spec: None)
    monkeypatch.setattr(lifecycle, "is_running", lambda folder, say: is_there)
    monkeypatch.setattr(lifecycle, "wait_until_settled", lambda folder, seconds, say: waited.append(seconds))
    for name in ("refuse_other_spec", "sweep", "refuse_taken", "start", "wait_for_router"):
        monkeypatch.setattr(lifecycle, name, lambda *_: None)
    spec = load_spec(LOCAL_CPU, ["placement.placement_timeout_s=40", "placement.start_timeout_s=500"])
    lifecycle.up(folder, spec, lambda line: None)
    assert waited == [540.0]

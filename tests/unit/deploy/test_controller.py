"""The controller's order of doing things, without Ray."""

from __future__ import annotations

import asyncio
import collections
import pathlib
import types
from typing import Any

import pytest

from core.clock import SystemClock
from core.errors import ConfigError
from core.request import Member
from deploy import controller as module
from deploy import replica_life
from deploy.control import ControlService
from deploy.controller import Controller
from deploy.reconcile import Fleet
from deploy.spec import load_spec
from protos import control_pb2

LOCAL_CPU = pathlib.Path(__file__).resolve().parents[3] / "deploy/clusters/local_cpu.yaml"


class Service:
    """Does not get its port, or notes what was started when it did."""

    def __init__(self, started: list[str], error: ConfigError | None) -> None:
        self._started, self._error = started, error

    async def start(self, address: str) -> None:
        if self._error is not None:
            raise self._error
        self._started.append(address)


class Lifeless(Controller):  # type: ignore[misc]  # its __init__ is a coroutine
    """Starts nothing but notes what it would."""

    def __init__(self, folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch, error: ConfigError | None = None) -> None:
        self.started: list[str] = []
        self.clock, self.spec, self.logs = SystemClock(), load_spec(LOCAL_CPU), folder / "logs"
        self.fleet, self.lives, self.members, self.members_version = Fleet(self.spec.placement), {}, [], 0
        self.events, self.changed, self.is_ending = collections.deque(), asyncio.Condition(), False
        self._key, self._kept, self._nodes, self._jobs = b"key", None, [], set()
        self._service: Any = Service(self.started, error)
        monkeypatch.setattr(module, "_internal_kv_put", lambda *_, **__: self.started.append("kept"))
        monkeypatch.setattr(module, "_internal_kv_del", lambda *_: self.started.append("forgotten"))
        monkeypatch.setattr(module, "_end_process", lambda: self.started.append("ended"))
        monkeypatch.setattr(module, "_end_myself", lambda: None)

    async def _look_at_nodes(self) -> None:
        pass

    def _start(self, role: str, index: int) -> None:
        self.started.append(f"{role}/{index}")


def test_nothing_is_kept_or_started_before_the_controller_can_be_reached(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        deaf = Lifeless(tmp_path, monkeypatch, ConfigError("router.control_address: taken"))
        await deaf._run()
        assert deaf.started == ["ended"]
        heard = Lifeless(tmp_path, monkeypatch)
        heard._loop = asyncio.create_task(heard._run())
        await asyncio.sleep(0.01)
        assert heard.started == ["127.0.0.1:8010", "kept", "router/0", "prefill/0", "decode/0"]
        await heard.shut_down()

    asyncio.run(run())


def test_a_cluster_that_is_being_taken_down_takes_no_orders(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        controller = Lifeless(tmp_path, monkeypatch)
        controller._loop = asyncio.create_task(asyncio.sleep(10))
        service = ControlService(controller, "token")
        await controller.shut_down()
        for reply in (
            await service.Apply(control_pb2.ApplyRequest(replicas={"decode": 2}), None),
            await service.Drain(control_pb2.DrainRequest(member="decode/0"), None),
        ):
            assert "is being taken down" in reply.error.message
        assert controller.started == ["forgotten"]

    asyncio.run(run())


def test_times_of_a_new_file_hold_for_replicas_that_run(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        controller = Lifeless(tmp_path, monkeypatch)
        controller.token = ""
        life = controller.lives["decode", 0] = controller._life("decode", 0)
        asked = list[float]()

        async def drain(seconds: float) -> None:
            asked.append(seconds)

        life._actors = [types.SimpleNamespace(drain=types.SimpleNamespace(remote=drain))]
        controller.set_spec(load_spec(LOCAL_CPU, ["placement.drain_timeout_s=7"]))
        await life.drain()
        assert asked == [7.0]

    asyncio.run(run())


def test_a_full_disk_does_not_end_the_controller(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        controller = Lifeless(tmp_path / "not there", monkeypatch)
        controller.members = [Member(role="decode", replica=0, rank=0, address="a:1", incarnation=1, metrics_address="a:2")]
        controller._write_metrics_targets()
        controller.logs = tmp_path / "logs"
        controller._write_metrics_targets()
        assert "a:2" in (tmp_path / "metrics_targets.json").read_text()

    asyncio.run(run())


def test_replicas_are_adopted_side_by_side_and_what_was_set_aside_for_those_that_died_is_given_back(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    living = ["controller", "decode/0.0", "decode/0.1", "prefill/0.0", "router/0.0"]
    groups = {"1": {"name": "decode/0"}, "2": {"name": "decode/1"}, "3": {"name": "of another namespace"}, "4": {"name": "prefill/0"}}
    removed = list[str]()

    def get_placement_group(name: str) -> str:
        if "/" not in name:
            raise ValueError(f"no group {name}")
        return name

    asked, all_asked = list[str](), asyncio.Event()

    async def adopt(self: replica_life.ReplicaLife) -> bool:
        """None answers before all are asked."""
        asked.append(self.name)
        if len(asked) == 3:
            all_asked.set()
        await asyncio.wait_for(all_asked.wait(), 5)
        self.reports = [types.SimpleNamespace(is_draining=False, revision="a")]  # type: ignore[list-item]
        return True

    monkeypatch.setattr(replica_life, "placement_group_table", lambda: groups)
    monkeypatch.setattr(replica_life, "get_placement_group", get_placement_group)
    monkeypatch.setattr(replica_life, "remove_placement_group", removed.append)
    monkeypatch.setattr(replica_life.ReplicaLife, "adopt", adopt)
    monkeypatch.setattr(module, "living_actors", lambda namespace: [{"name": name} for name in living])

    async def run() -> None:
        controller = Lifeless(tmp_path, monkeypatch)
        controller.token = ""
        await controller._adopt()
        assert set(controller.lives) == {("decode", 0), ("prefill", 0), ("router", 0)}

    asyncio.run(run())
    assert removed == ["decode/1"]

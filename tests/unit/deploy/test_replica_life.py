"""When a rank counts as one that does not answer, and what people are told of a process that died."""

from __future__ import annotations

import asyncio
import pathlib
import time
from collections.abc import Callable, Coroutine
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorUnavailableError

from core.clock import SystemClock
from deploy import replica_life as module
from deploy.placement import Plan
from deploy.reconcile import Fleet
from deploy.replica_life import ReplicaLife, died_of
from deploy.spec import load_spec

FILE = pathlib.Path(__file__).resolve().parents[3] / "deploy" / "clusters" / "local_cpu.yaml"
HEALTH_TIMEOUT_S = 0.03

CRASH = """The actor died unexpectedly before finishing this task.
\tclass_name: RankActor
\tnamespace: baton-local_cpu
The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker unexpectedly exits with \
a connection error code 2. End of file. Some common causes include: (1) the process was killed by the OOM killer due to high memory \
usage, (2) ray stop --force is called."""


@pytest.mark.parametrize(
    ("report", "sentence"),
    [
        (CRASH, "Worker unexpectedly exits with a connection error code 2. End of file."),
        ("The actor is dead\nbecause it was killed by `ray.kill`.", "because it was killed by `ray.kill`."),
        ("", ""),
        (f"exit: {'x' * 500}", f"exit: {'x' * 194}"),
    ],
)
def test_a_death_is_reported_without_guesses(report: str, sentence: str) -> None:
    assert died_of(report) == sentence


def look(report: Callable[[], Coroutine[Any, Any, str]]) -> list[Any]:
    """What the controller knows of a rank that answers as said, after one look."""
    spec = load_spec(FILE, [f"placement.health_timeout_s={HEALTH_TIMEOUT_S}"])
    life = ReplicaLife(spec, "decode", 0, pathlib.Path("none"), "", Fleet(spec.placement), SystemClock())
    life._actors = [SimpleNamespace(report=SimpleNamespace(remote=report))]
    asyncio.run(life._look())
    return life.reports


def test_a_rank_is_not_blamed_for_the_time_that_the_controller_stood_still() -> None:
    async def report() -> str:
        time.sleep(1.5 * HEALTH_TIMEOUT_S)  # of the whole process, the loop that waits for it among it
        await asyncio.sleep(HEALTH_TIMEOUT_S / 3)
        return "well"

    assert look(report) == ["well"]


def test_a_rank_that_does_not_answer_in_time_is_said_so_and_one_that_died_in_its_own_words() -> None:
    with pytest.raises(TimeoutError, match=r"no answer for 0\.03 s"):
        look(lambda: asyncio.sleep(60, ""))

    async def died() -> str:
        raise ConnectionError("End of file")

    with pytest.raises(ConnectionError, match="End of file"):
        look(died)


def test_a_rank_that_cannot_be_reached_for_a_moment_is_asked_again() -> None:
    asked = list[int]()

    async def report() -> str:
        asked.append(1)
        if len(asked) < 3:
            raise ActorUnavailableError("failed to connect to all addresses", None)
        return "well"

    assert look(report) == ["well"] and len(asked) == 3

    async def gone() -> str:
        raise ActorUnavailableError("failed to connect to all addresses", None)

    with pytest.raises(TimeoutError, match=r"no answer for 0\.03 s"):
        look(gone)


def test_a_replica_whose_node_is_lost_before_ray_has_set_its_place_aside_is_placed_on_another(monkeypatch: pytest.MonkeyPatch) -> None:
    live, removed = {"dead", "spare"}, list[str]()

    class Group:
        """Of a node that is gone Ray says nothing: it waits for it to come back."""

        def __init__(self, node: str) -> None:
            self.node = node

        def wait(self, timeout_s: float) -> bool:
            return self.node == "spare"

    def set_aside(bundles: list[Any], bundle_label_selector: list[dict[str, str]], **_: Any) -> Group:
        live.discard("dead")
        return Group(bundle_label_selector[0]["ray.io/node-id"])

    monkeypatch.setattr(module, "placement_group", set_aside)
    monkeypatch.setattr(module, "remove_placement_group", lambda group: removed.append(group.node))
    monkeypatch.setattr(module, "PLACEMENT_POLL_S", 0.001)
    spec = load_spec(FILE)
    life = ReplicaLife(spec, "decode", 0, pathlib.Path("none"), "", Fleet(spec.placement), SystemClock())

    async def place() -> Plan:
        async with asyncio.timeout(5):
            return await life._place(lambda ranks: Plan(nodes=(min(live),) * ranks), lambda plan: live >= set(plan.nodes))

    assert asyncio.run(place()).nodes == ("spare",)
    assert removed == ["dead"]


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_what_is_left_of_a_group_that_lost_a_rank_while_nobody_controlled_it_is_ended(monkeypatch: pytest.MonkeyPatch, lost: int) -> None:
    living = {f"decode/0.{rank}" for rank in range(3) if rank != lost}

    def get_actor(name: str, namespace: str) -> str:
        if name not in living:
            raise ValueError(f"no actor {name}")
        return name

    monkeypatch.setattr(module.ray, "get_actor", get_actor)
    monkeypatch.setattr(module.ray, "kill", lambda actor, no_restart: living.discard(actor))
    monkeypatch.setattr(module, "living_actors", lambda namespace: [{"name": name} for name in living])
    monkeypatch.setattr(module, "END_TIMEOUT_S", 0.2)
    spec = load_spec(FILE, ["decode.ranks_per_replica=3"])
    life = ReplicaLife(spec, "decode", 0, pathlib.Path("none"), "", Fleet(spec.placement), SystemClock())

    async def end() -> None:
        assert not await life.adopt()
        await life.stop()

    asyncio.run(end())
    assert not living

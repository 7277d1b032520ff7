"""The fleet's decisions, without a cluster."""

from __future__ import annotations

import random
from collections.abc import Mapping

import pytest

from deploy.config import PlacementConfig
from deploy.reconcile import Desired, Drain, Fleet, Phase, Start, Stop

CONFIG = PlacementConfig(
    placement_timeout_s=60, start_timeout_s=100, drain_timeout_s=30, restart_backoff_s=1, restart_backoff_max_s=8, stable_s=60
)


def want(revision: str = "a", **replicas: int) -> dict[str, Desired]:
    return {role: Desired(replicas=count, revision=revision) for role, count in replicas.items()}


class World:
    """Carries out what the fleet decides, at once, unless told otherwise."""

    def __init__(self, config: PlacementConfig = CONFIG) -> None:
        self.fleet = Fleet(config)
        self.now = 0.0
        self.broken: dict[str, str] = {}
        self.homeless: set[str] = set()
        self.busy: set[str] = set()
        self.log: list[str] = []

    def step(self, seconds: float = 1.0) -> None:
        self.now += seconds
        for action in self.fleet.decide(self.now):
            name = f"{action.role}/{action.index}"
            self.log.append(f"{type(action).__name__} {name}")
            if isinstance(action, Start):
                if name in self.homeless:
                    self.fleet.unplaced(action.role, action.index, "no room")
                    continue
                self.fleet.placed(action.role, action.index, self.now)
                if name in self.broken:
                    self.fleet.failed(action.role, action.index, self.broken[name], self.now)
                else:
                    self.fleet.ready(action.role, action.index, self.now)
            elif isinstance(action, Drain):
                if name not in self.busy:
                    self.fleet.drained(action.role, action.index)
            else:
                self.fleet.gone(action.role, action.index, self.now)

    def settle(self, desired: Mapping[str, Desired]) -> None:
        self.fleet.set_desired(desired, self.now)
        for _ in range(20):
            self.step()
        assert self.fleet.is_settled()

    def phases(self) -> dict[str, str]:
        return {replica.name: str(replica.phase) for replica in self.fleet.replicas.values()}


def test_it_starts_what_is_wanted_and_then_rests() -> None:
    world = World()
    world.settle(want(router=1, prefill=2, decode=1))
    assert world.phases() == {"router/0": "ready", "prefill/0": "ready", "prefill/1": "ready", "decode/0": "ready"}
    world.log.clear()
    world.step(1000)
    assert world.log == []


def test_scaling_down_drains_the_least_loaded() -> None:
    world = World()
    world.settle(want(decode=3))
    for index, requests in ((0, 7), (1, 2), (2, 5)):
        world.fleet.loaded("decode", index, requests)
    world.log.clear()
    world.settle(want(decode=1))
    assert world.log == ["Drain decode/1", "Drain decode/2", "Stop decode/1", "Stop decode/2"]
    assert world.phases() == {"decode/0": "ready"}


def test_scaling_down_takes_what_does_not_work_first() -> None:
    world = World()
    world.homeless = {"decode/2"}
    world.fleet.set_desired(want(decode=3), 0)
    world.step()
    assert world.phases() == {"decode/0": "ready", "decode/1": "ready", "decode/2": "placing"}
    world.log.clear()
    world.settle(want(decode=2))
    assert world.log == ["Stop decode/2"]


def test_a_drain_ends_at_its_deadline() -> None:
    world = World()
    world.settle(want(decode=2))
    world.busy = {"decode/1"}
    world.fleet.set_desired(want(decode=1), world.now)
    world.step()
    assert world.phases()["decode/1"] == "draining"
    world.step(CONFIG.drain_timeout_s - 1)
    assert world.phases()["decode/1"] == "draining" and not world.fleet.is_settled()
    world.step(1)
    assert world.phases() == {"decode/0": "ready"}


def test_scaling_to_zero_and_back_is_allowed() -> None:
    world = World()
    world.settle(want(decode=1))
    world.settle(want(decode=0))
    assert world.phases() == {}
    world.settle(want(decode=1))
    assert world.phases() == {"decode/0": "ready"}


def test_a_dead_rank_is_replaced_at_once() -> None:
    world = World()
    world.settle(want(prefill=1))
    world.step(1000)
    world.fleet.failed("prefill", 0, "killed", world.now)
    world.log.clear()
    world.step(0.1)
    world.step(0.1)
    assert world.log == ["Stop prefill/0", "Start prefill/0"] and world.phases() == {"prefill/0": "ready"}
    assert world.fleet.replicas["prefill", 0].num_restarts == 1 and world.fleet.is_settled()


def test_a_crash_loop_backs_off_and_is_reported() -> None:
    world = World()
    world.broken = {"prefill/0": "shard 1 is truncated"}
    world.fleet.set_desired(want(prefill=1, decode=1), 0)
    starts = []
    for _ in range(400):
        world.log.clear()
        world.step(0.1)
        starts += [round(world.now, 1) for line in world.log if line == "Start prefill/0"]
    pauses = [round(b - a) for a, b in zip(starts, starts[1:], strict=False)]
    assert pauses[:5] == [0, 1, 2, 4, 8] and set(pauses[4:]) == {8}
    assert world.fleet.problems() == ["prefill/0: shard 1 is truncated"]
    assert world.phases()["decode/0"] == "ready" and not world.fleet.is_settled()
    world.broken.clear()
    world.step(10)
    assert world.fleet.problems() == [] and world.fleet.is_settled()


def test_failures_count_anew_after_a_stable_time() -> None:
    world = World()
    world.settle(want(prefill=1))
    for _ in range(3):
        world.fleet.failed("prefill", 0, "killed", world.now)
        world.settle(want(prefill=1))
    assert world.fleet.replicas["prefill", 0].num_failures == 3
    world.step(CONFIG.stable_s)
    world.fleet.failed("prefill", 0, "killed", world.now)
    assert world.fleet.replicas["prefill", 0].num_failures == 1


def test_who_is_given_up_says_what_this_placement_waited_for_and_not_why_an_earlier_life_failed() -> None:
    fleet = Fleet(CONFIG)
    fleet.set_desired(want(prefill=1, decode=0), 0.0)
    assert fleet.decide(0.0) == [Start("prefill", 0)]
    fleet.placed("prefill", 0, 0.0)
    fleet.failed("prefill", 0, "no model", 0.0)
    fleet.decide(0.0)
    fleet.gone("prefill", 0, 0.0)
    assert fleet.decide(1.0) == [Start("prefill", 0)]
    fleet.placing("prefill", 0, "Ray is slow")
    assert fleet.replicas["prefill", 0].note == "no model", "what it waits for is no news yet"
    fleet.decide(1.0 + CONFIG.placement_timeout_s)
    fleet.gone("prefill", 0, 70.0)
    assert fleet.problems() == ["prefill/0: Ray is slow (given up after placement.placement_timeout_s = 60 s)"]


def test_what_cannot_be_placed_is_given_up_and_blocks_nobody() -> None:
    world = World()
    world.homeless = {"decode/1"}
    world.fleet.set_desired(want(prefill=1, decode=2), 0)
    world.step()
    world.fleet.set_desired(want(prefill=2, decode=2), world.now)
    world.step()
    assert world.phases() == {"prefill/0": "ready", "prefill/1": "ready", "decode/0": "ready", "decode/1": "placing"}
    world.step(CONFIG.placement_timeout_s)
    assert world.phases()["decode/1"] == "given up"
    assert (
        world.fleet.problems() == ["decode/1: no room (given up after placement.placement_timeout_s = 60 s)"] and world.fleet.is_settled()
    )
    world.step(10_000)
    assert world.phases()["decode/1"] == "given up"
    world.homeless.clear()
    world.fleet.nodes_changed(world.now)
    world.step()
    assert world.phases()["decode/1"] == "ready" and world.fleet.problems() == []


def test_a_rank_that_does_not_get_ready_is_restarted() -> None:
    fleet = Fleet(CONFIG)
    fleet.set_desired(want(prefill=1), 0)
    assert fleet.decide(0) == [Start("prefill", 0)]
    fleet.placed("prefill", 0, 0)
    assert fleet.decide(99) == []
    assert fleet.decide(100) == [Stop("prefill", 0)]
    fleet.gone("prefill", 0, 101)
    assert fleet.decide(101) == [Start("prefill", 0)]
    assert fleet.replicas["prefill", 0].num_failures == 1


def test_a_new_revision_replaces_one_replica_at_a_time() -> None:
    world = World()
    world.settle(want("a", decode=3))
    world.fleet.loaded("decode", 0, 3)
    world.log.clear()
    world.fleet.set_desired(want("b", decode=3), world.now)
    lowest = 3
    for _ in range(20):
        world.step()
        lowest = min(lowest, sum(phase == "ready" for phase in world.phases().values()))
    assert world.fleet.is_settled() and lowest == 2
    assert world.log == [f"{verb} decode/{i}" for i in (1, 2, 0) for verb in ("Drain", "Stop", "Start")]


def test_a_bad_revision_stops_at_its_first_replica() -> None:
    world = World()
    world.settle(want("a", decode=3))
    world.broken = {"decode/0": "bad option"}
    world.fleet.set_desired(want("b", decode=3), world.now)
    for _ in range(50):
        world.step()
    assert sum(phase == "ready" for phase in world.phases().values()) == 2
    assert {r.revision for r in world.fleet.replicas.values() if r.phase is Phase.READY} == {"a"}
    world.broken.clear()
    world.settle(want("a", decode=3))
    assert set(world.phases().values()) == {"ready"}


def test_it_is_quiet_when_nothing_but_troubled_replicas_is_on_its_way() -> None:
    world = World()
    world.broken = {"decode/0": "bad"}
    world.fleet.set_desired(want(decode=1, prefill=1), world.now)
    for _ in range(8):
        world.step()
    assert world.phases() == {"decode/0": "backoff", "prefill/0": "ready"} and world.fleet.is_quiet()
    world.fleet.set_desired(want(decode=1, prefill=2), world.now)
    fleet = world.fleet
    assert Start("prefill", 1) in fleet.decide(world.now) and not fleet.is_quiet()


def test_it_is_not_quiet_between_two_replicas_that_are_renewed_though_another_one_has_no_room() -> None:
    world = World()
    world.homeless = {"decode/3"}
    world.fleet.set_desired(want("a", decode=4), world.now)
    world.step()
    world.step(CONFIG.placement_timeout_s)
    assert world.fleet.is_settled() and world.fleet.is_quiet() and world.fleet.problems()
    world.fleet.set_desired(want("b", decode=4), world.now)
    world.step()
    world.step(CONFIG.placement_timeout_s)
    num_renewed = []
    for _ in range(20):
        world.step()
        ready = [replica for replica in world.fleet.replicas.values() if replica.phase is Phase.READY]
        num_renewed.append(sum(replica.revision == "b" for replica in ready))
        assert world.fleet.is_quiet() == (num_renewed[-1] == 3)
    assert {1, 2, 3} <= set(num_renewed)


def test_it_is_quiet_when_a_bad_revision_holds_up_the_others() -> None:
    world = World()
    world.settle(want("a", decode=3))
    world.broken = {"decode/0": "bad option"}
    world.fleet.set_desired(want("b", decode=3), world.now)
    assert not world.fleet.is_quiet()
    for _ in range(50):
        world.step()
    assert world.fleet.problems() == ["decode/0: bad option"] and world.fleet.is_quiet()
    assert world.fleet.ask_restart("decode", 1) and not world.fleet.is_quiet()


def test_a_mended_file_is_tried_at_once_and_is_not_blamed_for_the_one_before() -> None:
    world = World()
    world.broken = {"decode/0": "bad option"}
    world.fleet.set_desired(want("b", decode=1), world.now)
    for _ in range(12):
        world.step()
    assert world.phases() == {"decode/0": "backoff"} and world.fleet.problems() == ["decode/0: bad option"]
    world.fleet.set_desired(want("b", decode=1), world.now)
    assert world.fleet.problems() == ["decode/0: bad option"], "nothing has changed"
    world.broken.clear()
    world.fleet.set_desired(want("c", decode=1), world.now)
    assert world.fleet.problems() == []
    world.step(0.1)
    assert world.phases() == {"decode/0": "ready"} and world.fleet.replicas["decode", 0].num_failures == 0


def test_who_is_being_given_up_when_a_node_joins_is_tried_again() -> None:
    fleet = Fleet(CONFIG)
    fleet.set_desired(want(prefill=1), 0.0)
    assert fleet.decide(0.0) == [Start("prefill", 0)]
    assert fleet.decide(CONFIG.placement_timeout_s) == [Stop("prefill", 0)]
    fleet.nodes_changed(61.0)
    fleet.gone("prefill", 0, 62.0)
    assert fleet.decide(62.0) == [Start("prefill", 0)]


def test_a_replica_can_be_asked_to_restart() -> None:
    world = World()
    world.settle(want(decode=2))
    world.log.clear()
    assert world.fleet.ask_restart("decode", 1) and not world.fleet.ask_restart("decode", 7)
    assert not world.fleet.is_settled()
    for _ in range(5):
        world.step()
    assert world.log == ["Drain decode/1", "Stop decode/1", "Start decode/1"] and world.fleet.is_settled()


def test_adopted_replicas_are_not_started_again() -> None:
    fleet = Fleet(CONFIG)
    fleet.adopt("decode", 0, Phase.READY, "a", 0)
    fleet.adopt("decode", 1, Phase.DRAINING, "a", 0)
    fleet.set_desired(want(decode=2), 0)
    assert fleet.decide(0) == []
    fleet.drained("decode", 1)
    assert fleet.decide(1) == [Stop("decode", 1)]


def test_late_events_of_another_phase_are_void() -> None:
    world = World()
    world.settle(want(decode=1))
    world.fleet.placed("decode", 0, world.now)
    world.fleet.gone("decode", 0, world.now)
    world.fleet.drained("decode", 0)
    world.fleet.ready("decode", 9, world.now)
    assert world.phases() == {"decode/0": "ready"}


@pytest.mark.parametrize("seed", range(300))
def test_whatever_happens_it_comes_to_rest_as_wanted(seed: int) -> None:
    rng = random.Random(seed)
    world = World()
    counts = {"prefill": 1, "decode": 1}
    for _ in range(rng.randint(5, 60)):
        event = rng.random()
        if event < 0.2:
            counts = {role: rng.randint(0, 4) for role in counts}
            world.fleet.set_desired(want(rng.choice("ab"), **counts), world.now)
        elif event < 0.5 and world.fleet.replicas:
            role, index = rng.choice(list(world.fleet.replicas))
            world.fleet.failed(role, index, "killed", world.now)
        elif event < 0.6:
            role, index = rng.choice(["prefill", "decode"]), rng.randrange(4)
            rng.choice([world.broken.pop, world.broken.setdefault])(f"{role}/{index}", "bad")
        elif event < 0.7:
            world.homeless = {f"decode/{rng.randrange(4)}"}
        elif event < 0.8:
            world.busy = {f"decode/{rng.randrange(4)}"}
        elif event < 0.9:
            world.fleet.ask_restart("decode", rng.randrange(4))
        world.step(rng.choice([0.01, 1, 30]))
        for role, count in counts.items():
            staying = [r for r in world.fleet.replicas.values() if r.role == role and not r.is_leaving]
            if world.fleet._desired:
                assert len(staying) == count
    world.broken.clear()
    world.homeless.clear()
    world.busy.clear()
    world.fleet.set_desired(want("c", **counts), world.now)
    for _ in range(200):
        world.step(2)
    assert world.fleet.is_settled(), f"{seed=} {world.phases()}"
    assert world.phases() == {f"{role}/{i}": "ready" for role, n in counts.items() for i in _indexes(world, role, n)}


def _indexes(world: World, role: str, count: int) -> list[int]:
    found = [replica.index for replica in world.fleet.replicas.values() if replica.role == role]
    assert len(found) == count
    return found

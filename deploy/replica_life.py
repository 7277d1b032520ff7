"""One life of one replica: its placement group and its Ray actors, from start to stop. Reports what happens to the Fleet."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import pathlib
from collections.abc import Callable, Collection
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayActorError, RayError, RayTaskError
from ray.util import get_placement_group, placement_group, placement_group_table, remove_placement_group
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from core.clock import Clock
from core.errors import BatonError, ConfigError
from core.log import get_logger
from core.request import Member
from deploy.actor import Assignment, RankActor, Report
from deploy.placement import Plan, Unplaceable
from deploy.reconcile import Fleet
from deploy.spec import ClusterSpec

log = get_logger("controller")

PLACEMENT_POLL_S = 0.1
PLACEMENT_PATIENCE_S = 3.0
"""Ray grants what is free in milliseconds; when it takes longer people are told."""

LOOK_PARTS = 10
"""Of the time that a rank has for its answer. However long the controller itself does not run, only one of them passes."""

GRACE_S = 5.0
"""How long a worker may take to close its connections when it is stopped on purpose."""
END_TIMEOUT_S = 30.0
"""How long Ray may take to end a killed actor."""


class ReplicaLife:
    """Owner of the replica's actors and placement group. `begin` or `adopt` once, `stop` once."""

    def __init__(
        self, spec: ClusterSpec, role: str, index: int, logs: pathlib.Path, control_token: str, fleet: Fleet, clock: Clock
    ) -> None:
        self.role, self.index = role, index
        self.reports: list[Report] = []
        """The latest of each rank; empty until the replica is ready."""
        self.plan: Plan | None = None
        self.times = spec.placement
        """Whose time-outs and intervals hold now: those of a later file, too."""
        self._spec, self._logs, self._control_token, self._fleet, self._clock = spec, logs, control_token, fleet, clock
        self._actors: list[Any] = []
        self._group: PlacementGroup | None = None
        self._task: asyncio.Task[None] | None = None
        self._failed = False

    @property
    def name(self) -> str:
        return f"{self.role}/{self.index}"

    def members(self, state: str) -> list[Member]:
        """Its ranks as the routers are to know them."""
        return [dataclasses.replace(report.member, state=state) for report in self.reports if report.member is not None]

    def begin(self, make_plan: Callable[[int], Plan], is_there: Callable[[Plan], bool]) -> None:
        """Place and start it. `make_plan(ranks)` raises Unplaceable while there is no room; `is_there`: whether a plan's nodes live."""
        self._task = asyncio.create_task(self._guard(self._start(make_plan, is_there)))

    async def adopt(self) -> bool:
        """Take over running actors of this name. False if one is missing or not ready; then `stop` ends what is there."""
        ranks = range(self._spec.ranks_per_replica(self.role))
        for rank in ranks:
            with contextlib.suppress(ValueError):  # gone; `stop` ends the others
                self._actors.append(ray.get_actor(self._assignment(rank).name, namespace=self._spec.namespace))
        if len(self._actors) < len(ranks):
            return False
        try:
            await self._look()
            if self.role != "router":
                self._group = get_placement_group(self.name)
        except (ValueError, RayError, TimeoutError) as error:
            log.warning("adoption.failed", replica=self.name, error=error)
            return False
        if any(report.member is None for report in self.reports):
            return False
        self.plan = Plan(nodes=tuple(report.node_id for report in self.reports))
        self._task = asyncio.create_task(self._guard(self._watch()))
        return True

    async def drain(self) -> None:
        """Ask every rank to take no new work; `Fleet.drained` follows when all are done."""
        try:
            await asyncio.gather(*(actor.drain.remote(self.times.drain_timeout_s) for actor in self._actors))
        except RayError as error:
            log.warning("drain.failed", replica=self.name, error=reason_of(error))

    async def stop(self) -> None:
        """End all processes and give the resources back; returns when the names are free again."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self.reports and not self._failed:
            await asyncio.wait([asyncio.ensure_future(_swallow(actor.stop.remote())) for actor in self._actors], timeout=GRACE_S)
        for actor in self._actors:
            ray.kill(actor, no_restart=True)
        if self._group is not None:
            remove_placement_group(self._group)
        await self._wait_until_gone()

    async def _guard(self, life: Any) -> None:
        try:
            await life
        except Exception as error:  # outermost: whatever it is, it ends this life only
            if not isinstance(error, (RayError, BatonError, TimeoutError)):
                log.exception("replica.failed", replica=self.name)
            self._failed = True
            self._fleet.failed(self.role, self.index, reason_of(error), self._clock.now())

    async def _start(self, make_plan: Callable[[int], Plan], is_there: Callable[[Plan], bool]) -> None:
        self.plan = await self._place(make_plan, is_there)
        self._fleet.placed(self.role, self.index, self._clock.now())
        for rank, node in enumerate(self.plan.nodes):
            assignment = self._assignment(rank)
            self._actors.append(ray.remote(RankActor).options(name=assignment.name, **self._options(rank, node)).remote(assignment))
        rendezvous = await self._actors[0].open_rendezvous.remote() if len(self._actors) > 1 else ""
        self.reports = list(await asyncio.gather(*(actor.start.remote(rendezvous) for actor in self._actors)))
        self._fleet.ready(self.role, self.index, self._clock.now())
        await self._watch()

    async def _place(self, make_plan: Callable[[int], Plan], is_there: Callable[[Plan], bool]) -> Plan:
        """Choose nodes and wait for Ray to set the resources aside. Ends only with a place: the Fleet watches the time."""
        while True:
            try:
                plan = make_plan(self._spec.ranks_per_replica(self.role))
            except Unplaceable as error:
                self._fleet.unplaced(self.role, self.index, str(error))
                await asyncio.sleep(1.0)
                continue
            if self.role == "router":
                return plan
            self.plan = plan
            if await self._set_aside(plan, is_there):
                return plan
            log.info("placement.lost", replica=self.name, nodes=",".join(plan.nodes))

    async def _set_aside(self, plan: Plan, is_there: Callable[[Plan], bool]) -> bool:
        """Returns when Ray has set the resources aside; False if a node of the plan is gone, for which Ray would wait for ever."""
        bundle: dict[str, float] = {"CPU": self._spec.placement.cpus_per_rank}
        if self._spec.placement.gpus_per_rank:
            bundle["GPU"] = self._spec.placement.gpus_per_rank
        asked = f"Ray has not set aside {_resources(bundle)} for each of {len(plan.nodes)} ranks on the nodes chosen"
        self._fleet.placing(self.role, self.index, asked)
        self._group = placement_group(
            [dict(bundle) for _ in plan.nodes],
            strategy="PACK",
            name=self.name,
            lifetime="detached",
            bundle_label_selector=[{"ray.io/node-id": node} for node in plan.nodes],
        )
        patient_until = self._clock.now() + PLACEMENT_PATIENCE_S
        while not await asyncio.to_thread(self._group.wait, 0.01):
            if not is_there(plan):
                remove_placement_group(self._group)
                self._group = None
                return False
            if self._clock.now() > patient_until:
                why = f"{asked}: something else on this Ray cluster uses them, or Ray is slow on a busy machine"
                self._fleet.unplaced(self.role, self.index, why)
            await asyncio.sleep(PLACEMENT_POLL_S)
        return True

    def _options(self, rank: int, node: str) -> dict[str, Any]:
        common: dict[str, Any] = {"lifetime": "detached", "namespace": self._spec.namespace, "max_restarts": 0, "max_task_retries": 0}
        if self.role == "router":
            return common | {"num_cpus": 0, "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False)}
        placement = self._spec.placement
        assert self._group is not None, f"{self.name} has no placement group"
        return common | {
            "num_cpus": placement.cpus_per_rank,
            "num_gpus": placement.gpus_per_rank,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=rank),
        }

    async def _watch(self) -> None:
        while True:
            await self._look()
            load = [report.load for report in self.reports]
            self._fleet.loaded(self.role, self.index, sum(one.num_running + one.num_waiting for one in load))
            if all(report.is_drained for report in self.reports):
                self._fleet.drained(self.role, self.index)
            await asyncio.sleep(self.times.health_interval_s)

    async def _look(self) -> None:
        """Hear how all ranks are. Raises TimeoutError if one does not say so in time; time in which this process stood still, or waited for
        Ray, is no rank's fault. Until then a rank that Ray cannot reach is asked again: it may be the network, and Ray tells if it died."""
        timeout_s = self.times.health_timeout_s
        answers = self._ask()
        try:
            for _ in range(LOOK_PARTS):
                done, _ = await asyncio.wait({answers}, timeout=timeout_s / LOOK_PARTS)
                if not done:
                    continue
                try:
                    self.reports = answers.result()
                    return
                except ActorUnavailableError as error:
                    log.warning("rank.unreachable", replica=self.name, error=reason_of(error))
                    await asyncio.sleep(timeout_s / LOOK_PARTS)
                    answers = self._ask()
        finally:
            answers.cancel()
            await asyncio.gather(answers, return_exceptions=True)
        raise TimeoutError(f"no answer for {timeout_s:g} s")

    def _ask(self) -> asyncio.Future[list[Report]]:
        return asyncio.gather(*(actor.report.remote() for actor in self._actors))

    async def _wait_until_gone(self) -> None:
        end = self._clock.now() + END_TIMEOUT_S
        names = {self._assignment(rank).name for rank in range(self._spec.ranks_per_replica(self.role))}
        while names & {found["name"] for found in living_actors(self._spec.namespace)}:
            if self._clock.now() > end:
                raise ConfigError(f"Ray did not end {self.name} in {END_TIMEOUT_S:g} s")
            await asyncio.sleep(0.1)

    def _assignment(self, rank: int) -> Assignment:
        return Assignment(
            spec=self._spec,
            role=self.role,
            index=self.index,
            rank=rank,
            revision=self._spec.revision(self.role),
            logs=self._logs,
            control_token=self._control_token,
        )


def _resources(bundle: dict[str, float]) -> str:
    return " and ".join(f"{amount:g} {name}" for name, amount in bundle.items())


def remove_groups(but: Collection[str] = ()) -> None:
    """Give back the resources of all replicas of this process's namespace but those of these names."""
    for name in {group["name"] for group in placement_group_table().values()} - set(but):
        try:
            remove_placement_group(get_placement_group(name))
        except ValueError:  # of another namespace, or removed
            continue
        log.info("group.removed", replica=name)


def living_actors(namespace: str) -> list[dict[str, str]]:
    """Named actors of the cluster that are not dead: dicts with "name" and "namespace"."""
    return [found for found in ray.util.list_named_actors(all_namespaces=True) if found["namespace"] == namespace]


async def _swallow(reference: Any) -> None:
    """Wait for a call whose failure means that the process is gone, which is as good."""
    try:
        await reference
    except RayError as error:
        log.debug("stop.failed", error=reason_of(error))


def reason_of(error: BaseException) -> str:
    """One line for people."""
    if isinstance(error, RayTaskError):
        return f"{error.cause}"
    if isinstance(error, RayActorError):
        return f"its process died: {died_of(str(error))}"
    return str(error)


def died_of(text: str) -> str:
    """The one informative sentence of Ray's report on a dead actor: without its guesses at causes, which come after it."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    line = next((line for line in lines if "exit" in line.lower() and ":" in line), lines[-1] if lines else "")
    return line.rpartition("Worker exit detail:")[2].partition(" Some common causes")[0].strip()[:200]

"""The controller: a detached Ray actor that holds the desired state and brings the cluster to it.

Ray starts it again when it dies. It then reads the desired state from Ray's key-value store, adopts the actors that are running,
and goes on; while it is away, routers and ranks serve with what they know.
"""

from __future__ import annotations

import asyncio
import collections
import datetime
import json
import os
import pathlib
from typing import Any

import ray
from ray.exceptions import RayError
from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get, _internal_kv_put
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from core.clock import SystemClock
from core.config import parse_config
from core.errors import BatonError, ConfigError
from core.log import get_logger, set_up_logging
from core.request import Member
from deploy.control import ControlService
from deploy.output import send_output_to
from deploy.placement import Node, Plan, plan_replica
from deploy.reconcile import Desired, Drain, Fleet, Phase, Start
from deploy.replica_life import ReplicaLife, living_actors, reason_of, remove_groups
from deploy.spec import ROLES, ClusterSpec

log = get_logger("controller")

ACTOR_NAME = "controller"
TICK_S = 0.1
NODES_INTERVAL_S = 2.0
MAX_EVENTS = 200


class Controller:
    """Owner of the desired state, the fleet and every replica's life."""

    async def __init__(self, spec_yaml: str, logs: str, token: str) -> None:  # type: ignore[misc]  # Ray awaits an actor's __init__
        """`spec_yaml` counts for the first life only. `token`: what callers of its service must carry."""
        self.logs, self.token = pathlib.Path(logs), token
        send_output_to(self.logs / "controller.log")
        set_up_logging()
        self.clock = SystemClock()
        self.began = self.clock.now()
        self.events: collections.deque[str] = collections.deque(maxlen=MAX_EVENTS)
        self.members: list[Member] = []
        self.members_version = 0
        self.changed = asyncio.Condition()
        self.lives: dict[tuple[str, int], ReplicaLife] = {}
        self._key = spec_key(ray.get_runtime_context().namespace)
        self._kept = _internal_kv_get(self._key)
        self.spec = parse_config(self._kept.decode() if self._kept else spec_yaml, "the cluster's file", ClusterSpec)
        self.fleet = Fleet(self.spec.placement)
        self._nodes: list[Node] = []
        self._jobs: set[asyncio.Task[None]] = set()
        self.is_ending = False
        """Told to end: no order is taken any more."""
        self._service = ControlService(self, token)
        self._loop = asyncio.create_task(self._run())

    async def begin(self) -> None:
        """Serve on the control address. Raises ConfigError if it cannot be had."""
        await self._service.started()

    def set_spec(self, spec: ClusterSpec) -> None:
        """Make this the desired state, and remember it beyond this process."""
        _internal_kv_put(self._key, spec.to_yaml().encode(), overwrite=True)
        self._want(spec)
        self._act()

    async def shut_down(self) -> None:
        """Stop every replica, forget the desired state, then end this actor for good."""
        self.is_ending = True
        self._loop.cancel()
        await asyncio.gather(*(life.stop() for life in self.lives.values()), return_exceptions=True)
        _internal_kv_del(self._key)
        log.info("controller.done", cluster=self.spec.name)
        asyncio.get_running_loop().call_later(0.5, _end_myself)

    async def _run(self) -> None:
        """The loop. Anything unforeseen ends the process, and Ray starts the next controller."""
        next_look = 0.0
        try:
            log.info("controller.started", cluster=self.spec.name, is_first_life=self._kept is None)
            await self._look_at_nodes()
            if self._kept:
                await self._adopt()
            self._want(self.spec)
            await self._publish()  # before a router can ask: an empty list would end its sessions with the adopted ranks
            await self._service.start(self.spec.router.control_address)
            self.set_spec(self.spec)  # not before: what a controller that nobody can reach has started is hard to end
            while True:
                now = self.clock.now()
                if now >= next_look:
                    await self._look_at_nodes()
                    next_look = now + NODES_INTERVAL_S
                self._act()
                self._drain_events()
                await self._publish()
                await asyncio.sleep(TICK_S)
        except Exception:  # outermost
            log.exception("controller.failed")
            await asyncio.sleep(0.5)  # whoever waits in `begin` hears why
            _end_process()

    def _want(self, spec: ClusterSpec) -> None:
        self.spec = spec
        self.fleet.config = spec.placement
        for life in self.lives.values():
            life.times = spec.placement
        self.fleet.set_desired({role: Desired(spec.replicas(role), spec.revision(role)) for role in ROLES}, self.clock.now())

    def _act(self) -> None:
        for action in self.fleet.decide(self.clock.now()):
            if isinstance(action, Start):
                self._start(action.role, action.index)
            elif isinstance(action, Drain):
                self._spawn(self.lives[action.role, action.index].drain())
            else:
                self._spawn(self._stop(action.role, action.index))

    def _start(self, role: str, index: int) -> None:
        life = self.lives[role, index] = self._life(role, index)
        life.begin(lambda ranks: self._plan(life, ranks), self._is_there)

    def _life(self, role: str, index: int) -> ReplicaLife:
        return ReplicaLife(self.spec, role, index, self.logs, self.token, self.fleet, self.clock)

    def _plan(self, life: ReplicaLife, ranks: int) -> Plan:
        if life.role == "router":  # all routers share one port, so they share a host: this one
            return Plan(nodes=(ray.get_runtime_context().get_node_id(),))
        others = (other.plan for other in self.lives.values() if other is not life and other.role != "router")
        used = collections.Counter(node for plan in others if plan is not None for node in plan.nodes)
        return plan_replica(self.spec.placement, ranks, self._nodes, used)

    def _is_there(self, plan: Plan) -> bool:
        return {node.node_id for node in self._nodes} >= set(plan.nodes)

    async def _stop(self, role: str, index: int) -> None:
        await self.lives[role, index].stop()
        del self.lives[role, index]
        self.fleet.gone(role, index, self.clock.now())

    async def _adopt(self) -> None:
        """Find the replicas that outlived the last controller. Side by side: one that hangs takes its time to answer, or not."""
        names = {actor["name"].rpartition(".")[0] for actor in living_actors(self.spec.namespace) if "/" in actor["name"]}
        await asyncio.gather(*(self._adopt_or_end(name) for name in sorted(names)))
        # Of replicas that the last controller was starting or ending when it died, or that died with it.
        remove_groups(but=[life.name for life in self.lives.values()])

    async def _adopt_or_end(self, name: str) -> None:
        role, _, text = name.partition("/")
        index = int(text)
        life = self._life(role, index)
        if not await life.adopt():
            await life.stop()
            return
        self.lives[role, index] = life
        phase = Phase.DRAINING if any(report.is_draining for report in life.reports) else Phase.READY
        self.fleet.adopt(role, index, phase, life.reports[0].revision, self.clock.now())

    async def _look_at_nodes(self) -> None:
        nodes = [
            Node(
                node_id=raw["NodeID"],
                address=raw["NodeManagerAddress"],
                cpus=raw["Resources"].get("CPU", 0.0),
                gpus=int(raw["Resources"].get("GPU", 0)),
                labels=raw["Labels"],
            )
            for raw in await asyncio.to_thread(ray.nodes)
            if raw["Alive"]
        ]
        if {node.node_id for node in nodes} - {node.node_id for node in self._nodes}:
            self.fleet.nodes_changed(self.clock.now())
        self._nodes = nodes

    def _drain_events(self) -> None:
        for sentence in self.fleet.events:
            log.info("fleet.changed", what=sentence)
            self.events.append(f"{datetime.datetime.now(datetime.UTC):%H:%M:%SZ} {sentence}")
        self.fleet.events.clear()

    async def _publish(self) -> None:
        """Tell the watchers if the list of members is not what it was."""
        members: list[Member] = []
        for key, life in self.lives.items():
            phase = self.fleet.replicas[key].phase
            if phase in (Phase.READY, Phase.DRAINING):
                members += life.members(str(phase))
        if members != self.members:
            self.members = members
            self.members_version += 1
            self._write_metrics_targets()
            async with self.changed:
                self.changed.notify_all()

    def _write_metrics_targets(self) -> None:
        """For Prometheus (file_sd_configs): the members' endpoints change with every restart."""
        targets = [{"targets": [m.metrics_address], "labels": {"member": m.name}} for m in self.members if m.metrics_address]
        path = self.logs.parent / "metrics_targets.json"
        try:
            path.with_suffix(".new").write_text(json.dumps(targets, indent=1))
            path.with_suffix(".new").replace(path)
        except OSError as error:  # a full disk is no reason to let ranks be without a controller
            log.warning("metrics_targets.failed", path=path, reason=error.strerror)

    def _spawn(self, job: Any) -> None:
        task = asyncio.create_task(self._guard(job))
        self._jobs.add(task)
        task.add_done_callback(self._jobs.discard)

    async def _guard(self, job: Any) -> None:
        try:
            await job
        except Exception:  # outermost
            log.exception("controller.failed")
            if not self.is_ending:
                _end_process()


def spec_key(namespace: str) -> bytes:
    """Under which the desired state is in Ray's key-value store."""
    return f"baton/{namespace}/spec".encode()


def start_controller(spec: ClusterSpec, logs: pathlib.Path, token: str) -> None:
    """Create the actor in the Ray cluster that this process is connected to; returns when it serves. Raises ConfigError."""
    actor: Any = ray.remote(Controller).options(
        name=ACTOR_NAME,
        namespace=spec.namespace,
        lifetime="detached",
        max_restarts=-1,
        max_task_retries=0,
        num_cpus=0,
        scheduling_strategy=NodeAffinitySchedulingStrategy(_node_of(spec.router.control_address), soft=False),
    )
    handle = actor.remote(spec.to_yaml(), str(logs), token)
    try:
        ray.get(handle.begin.remote(), timeout=60)
    except (RayError, BatonError) as error:
        ray.kill(handle, no_restart=True)
        raise ConfigError(f"the controller did not start: {reason_of(error)}") from error


def _node_of(control_address: str) -> str:
    """Id of the Ray node that has this address; loopback is this machine's. Raises ConfigError."""
    host = control_address.rpartition(":")[0]
    if host in ("localhost", "[::1]") or host.startswith("127."):
        return str(ray.get_runtime_context().get_node_id())
    nodes = {raw["NodeManagerAddress"]: raw["NodeID"] for raw in ray.nodes() if raw["Alive"]}
    if host not in nodes:
        raise ConfigError(f"router.control_address: no Ray node has the address {host}; there are {', '.join(sorted(nodes))}")
    return str(nodes[host])


def _end_myself() -> None:
    """On purpose: Ray does not start it again."""
    ray.kill(ray.get_runtime_context().current_actor, no_restart=True)


def _end_process() -> None:
    os._exit(1)

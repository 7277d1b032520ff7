"""The Ray actor around one process of the cluster: a prefill rank, a decode rank or a router.

It builds the worker of its role, starts it, reports on it, and ends with it. Data never passes through Ray: the controller calls
`start`, `report`, `drain` and `stop`, everything else travels over gRPC, NIXL and HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import pathlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import ray

from core.clock import SystemClock
from core.log import get_logger, set_up_logging, write_out
from core.rank_worker import Place
from core.request import Load, Member
from deploy.output import send_output_to
from deploy.spec import ClusterSpec

log = get_logger("rank")


class Worker(Protocol):
    """What PrefillWorker, DecodeWorker and RouterWorker have in common."""

    async def start(self) -> Member: ...

    def load(self) -> Load: ...

    def note(self) -> str:
        """What an operator should know of it, in a line; "" if nothing."""
        ...

    async def drain(self, deadline_s: float) -> bool: ...

    async def stop(self) -> None: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Assignment:
    """What one actor is to be."""

    spec: ClusterSpec
    role: str
    index: int
    """Replica within the role."""
    rank: int
    """Rank within the replica."""
    revision: str
    logs: pathlib.Path
    """Folder for its log file, made if it is not there."""
    control_token: str = field(repr=False)
    """What the controller's service asks of a router."""

    @property
    def name(self) -> str:
        """Name of the Ray actor in the cluster's namespace: that of the member."""
        return f"{self.role}/{self.index}.{self.rank}"

    @property
    def log_path(self) -> pathlib.Path:
        return self.logs / f"{self.role}-{self.index}.{self.rank}.log"


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """An actor's answer to "how are you?"."""

    member: Member | None
    """None while it is starting."""
    is_draining: bool
    is_drained: bool
    load: Load
    note: str
    revision: str
    node_id: str
    pid: int
    uptime_s: float


class RankActor:
    """One life of one member. Ends its process when its worker cannot go on."""

    def __init__(self, assignment: Assignment) -> None:
        send_output_to(assignment.log_path)
        set_up_logging()
        self._assignment, self._clock = assignment, SystemClock()
        self._began = self._clock.now()
        self._worker: Worker | None = None
        self._rendezvous: Any = None
        self._member: Member | None = None
        self._draining: asyncio.Task[bool] | None = None

    async def open_rendezvous(self) -> str:
        """On rank 0 of a group, before `start`: the address at which all ranks of this life of the group find each other."""
        from engine.parallel.group import Rendezvous

        self._rendezvous = Rendezvous(_host_of(self._assignment.spec))
        return str(self._rendezvous.address)

    async def start(self, rendezvous: str = "") -> Report:
        """`rendezvous`: that of its group, if the replica has several ranks. Returns when the member serves. Raises what the worker raises
        (ConfigError, CheckpointError, GroupLost)."""
        log.info("rank.started", member=self._assignment.name, pid=os.getpid(), revision=self._assignment.revision)
        with imported_for_good():
            self._worker = _new_worker(self._assignment, rendezvous, self._rendezvous)
        self._member = await self._worker.start()
        return await self.report()

    async def report(self) -> Report:
        return Report(
            member=self._member,
            is_draining=self._draining is not None,
            is_drained=self._draining is not None and self._draining.done(),
            load=self._worker.load() if self._worker is not None and self._member is not None else Load(),
            note=self._worker.note() if self._worker is not None and self._member is not None else "",
            revision=self._assignment.revision,
            node_id=ray.get_runtime_context().get_node_id(),
            pid=os.getpid(),
            uptime_s=self._clock.now() - self._began,
        )

    async def drain(self, deadline_s: float) -> None:
        """Take no new work; reports say when none is left. Returns at once."""
        if self._draining is None and self._worker is not None:
            log.info("rank.draining", member=self._assignment.name)
            self._draining = asyncio.create_task(self._worker.drain(deadline_s))

    async def stop(self) -> None:
        if self._worker is not None:
            await self._worker.stop()
        log.info("rank.done", member=self._assignment.name)
        write_out()  # the controller kills this process next


@contextlib.contextmanager
def imported_for_good() -> Iterator[None]:
    """What there is at the end stays while the process lives: the collector of garbage looks at none of it, neither meanwhile nor later.
    For torch's 200,000 objects it stops every thread for 0.1 s, some times in an import and, later, in the midst of steps."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _host_of(spec: ClusterSpec) -> str:
    """The address of this node for other members."""
    return "127.0.0.1" if spec.placement.ray == "embedded" else str(ray.util.get_node_ip_address())


def _new_worker(assignment: Assignment, rendezvous_address: str, rendezvous: Any) -> Worker:
    """Imports only what the role needs: a router loads no torch."""
    spec, host = assignment.spec, _host_of(assignment.spec)
    if assignment.role == "router":
        from deploy.router_worker import RouterWorker

        return RouterWorker(spec, assignment.index, assignment.control_token, host)
    from engine.parallel.group import Seat

    size = spec.ranks_per_replica(assignment.role)
    name = f"{assignment.role}/{assignment.index}"
    common: dict[str, Any] = {
        "model_path": spec.model_path,
        "engine": spec.engine,
        "transfer": spec.transfer.on_loopback() if spec.placement.ray == "embedded" else spec.transfer,
        "place": Place(host=host, replica=assignment.index, rank=assignment.rank),
        "on_death": _die,
        "seat": Seat(rank=assignment.rank, size=size, name=name, host=host, rendezvous=rendezvous_address) if size > 1 else None,
        "rendezvous": rendezvous,
    }
    if assignment.role == "prefill":
        from prefill_worker.worker import PrefillWorker

        return PrefillWorker(config=spec.prefill, **common)
    from decode_worker.worker import DecodeWorker

    return DecodeWorker(config=spec.decode, **common)


def _die(reason: str) -> None:
    """The controller sees the actor die and starts another."""
    log.error("rank.failed", reason=reason)
    os._exit(1)

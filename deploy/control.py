"""The controller's gRPC service (protos/control.proto): routers watch the members, the baton command asks and orders."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import grpc.aio

from core.codec import encode_error, encode_load, encode_member
from core.config import differences, parse_config
from core.errors import BatonError, ConfigError
from core.log import get_logger
from core.request import Member
from core.rpc import new_server
from deploy.ports import refuse_taken
from deploy.reconcile import Phase, Replica
from deploy.spec import ROLES, ClusterSpec, check_files, restart_only
from protos import control_pb2, control_pb2_grpc

if TYPE_CHECKING:
    from deploy.controller import Controller

log = get_logger("controller")

BIND_ATTEMPTS = 20

WATCH_INTERVAL_S = 2.0
"""A watcher hears the list at least so often."""

_REFUSED = control_pb2.ApplyReply(error=encode_error(ConfigError("the cluster is being taken down: no orders are taken any more")))


class ControlService(control_pb2_grpc.ControlServicer):
    def __init__(self, controller: Controller, token: str) -> None:
        """`token`: what every call must carry."""
        self._controller, self._token = controller, token
        self._started: asyncio.Future[grpc.aio.Server] = asyncio.get_running_loop().create_future()

    async def start(self, address: str) -> None:
        """Listen; a controller that died a moment ago may still hold the port for a while. Raises ConfigError if it stays taken."""
        for attempt in range(BIND_ATTEMPTS):
            server = new_server(self._token)
            control_pb2_grpc.add_ControlServicer_to_server(self, server)
            try:
                server.add_insecure_port(address)
            except RuntimeError:
                log.warning("control.port_taken", address=address, attempt=attempt)
                await asyncio.sleep(0.5)
                continue
            await server.start()
            self._started.set_result(server)
            return
        error = ConfigError(f"router.control_address: cannot listen on {address}: it is taken")
        self._started.set_exception(error)
        raise error

    async def started(self) -> None:
        """Returns when the service answers; raises what kept it from that."""
        await asyncio.shield(self._started)

    async def Watch(self, request: Any, context: Any) -> AsyncIterator[Any]:
        controller = self._controller
        log.info("watch.started", watcher=request.name)
        while True:
            seen = controller.members_version
            ranks = [encode_member(member) for member in controller.members if member.role != "router" and member.address]
            yield control_pb2.Members(members=ranks)
            try:
                await asyncio.wait_for(self._change_from(seen), WATCH_INTERVAL_S)
            except TimeoutError:
                continue

    async def _change_from(self, version: int) -> None:
        async with self._controller.changed:
            await self._controller.changed.wait_for(lambda: self._controller.members_version != version)

    async def Status(self, request: Any, context: Any) -> Any:
        controller = self._controller
        rows = [(replica, row) for replica in controller.fleet.replicas.values() for row in self._rows(replica)]
        return control_pb2.ClusterStatus(
            name=controller.spec.name,
            model=controller.spec.served_name,
            ranks=[row for replica, row in rows if replica.role != "router"],
            routers=[row for replica, row in rows if replica.role == "router"],
            desired_replicas={role: controller.spec.replicas(role) for role in ROLES},
            controller_uptime_s=controller.clock.now() - controller.began,
            events=controller.events,
            settled=controller.fleet.is_settled(),
            quiet=controller.fleet.is_quiet(),
            problems=[*controller.fleet.problems(), *misfits(controller.members)],
            spec_yaml=controller.spec.to_yaml(),
        )

    async def Apply(self, request: Any, context: Any) -> Any:
        controller = self._controller
        if controller.is_ending:
            return _REFUSED
        try:
            spec = parse_config(request.spec_yaml, "the file", ClusterSpec) if request.spec_yaml else controller.spec
            spec = spec.scaled(dict(request.replicas))
            if request.spec_yaml:
                check_files(spec)
            if reasons := restart_only(controller.spec, spec):
                raise ConfigError("; ".join(reasons) + ": run `baton down` and `baton up`")
            if spec.router.processes and (spec.router.host, spec.router.port) != (controller.spec.router.host, controller.spec.router.port):
                refuse_taken("router.port", spec.router.host, spec.router.port)
        except BatonError as error:
            return control_pb2.ApplyReply(error=encode_error(error))
        changes = differences(controller.spec, spec)
        if changes and not request.dry_run:
            log.info("spec.changed", changes="; ".join(changes))
            controller.set_spec(spec)
        return control_pb2.ApplyReply(changes=changes)

    async def Drain(self, request: Any, context: Any) -> Any:
        if self._controller.is_ending:
            return _REFUSED
        fleet, spec = self._controller.fleet, self._controller.spec
        for replica in fleet.replicas.values():
            ranks = [f"{replica.name}.{rank}" for rank in range(spec.ranks_per_replica(replica.role))]
            if request.member in (replica.name, *ranks) and fleet.ask_restart(replica.role, replica.index):
                return control_pb2.ApplyReply(changes=[f"{replica.name}: drain, then restart"])
        ready = [replica.name for replica in fleet.replicas.values() if replica.phase is Phase.READY and not replica.is_leaving]
        error = ConfigError(f"{request.member!r} is no ready replica; those are {', '.join(sorted(ready)) or 'none'}")
        return control_pb2.ApplyReply(error=encode_error(error))

    async def Shutdown(self, request: Any, context: Any) -> Any:
        await self._controller.shut_down()
        return control_pb2.ApplyReply()

    def _rows(self, replica: Replica) -> list[Any]:
        """A line for each rank; a replica that has none yet gets one of its own."""
        state = str(replica.phase)
        common: dict[str, Any] = {"restarts": replica.num_restarts}
        life = self._controller.lives.get((replica.role, replica.index))
        if life is None or not life.reports or replica.phase not in (Phase.READY, Phase.DRAINING):
            member = Member(role=replica.role, replica=replica.index, rank=0, address="", incarnation=0, state=state)
            return [control_pb2.RankStatus(member=encode_member(member), note=replica.note, **common)]
        return [
            control_pb2.RankStatus(
                member=encode_member(member),
                node=report.node_id[:8],
                pid=report.pid,
                uptime_s=report.uptime_s,
                load=encode_load(report.load),
                note=replica.note or report.note,
                **common,
            )
            for member, report in zip(life.members(state), life.reports, strict=True)
        ]


def misfits(members: list[Member]) -> list[str]:
    """Ranks that can be paired with no rank of the other role, since their KV layouts differ."""
    layouts = {role: {member.fingerprint for member in members if member.role == role} for role in ("prefill", "decode")}
    found = []
    for member in members:
        other = {"prefill": "decode", "decode": "prefill"}.get(member.role)
        if other and layouts[other] and member.fingerprint not in layouts[other]:
            found.append(f"{member.name}: KV layout {member.fingerprint} fits no {other} rank ({', '.join(sorted(layouts[other]))})")
    return found

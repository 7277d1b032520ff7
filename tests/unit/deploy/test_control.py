"""What `baton apply` asks of the controller, without a cluster."""

from __future__ import annotations

import asyncio
import dataclasses
import pathlib
import socket
from types import SimpleNamespace
from typing import Any, cast

from core.codec import decode_error, decode_member
from core.request import Member
from deploy.control import ControlService
from deploy.controller import Controller
from deploy.reconcile import Fleet, Phase
from deploy.spec import ClusterSpec, load_spec
from protos import control_pb2

LOCAL_CPU = pathlib.Path(__file__).resolve().parents[3] / "deploy/clusters/local_cpu.yaml"


def applied(running: ClusterSpec, wanted: ClusterSpec) -> tuple[Any, list[ClusterSpec]]:
    """The reply, and what was set."""
    wishes: list[ClusterSpec] = []

    async def ask() -> Any:
        service = ControlService(cast(Controller, SimpleNamespace(spec=running, set_spec=wishes.append, is_ending=False)), "token")
        return await service.Apply(control_pb2.ApplyRequest(spec_yaml=wanted.to_yaml()), None)

    return asyncio.run(ask()), wishes


def test_routers_hear_of_the_ranks_that_serve_alone() -> None:
    serving = Member(role="decode", replica=0, rank=0, address="d:1", incarnation=1)
    following, router = dataclasses.replace(serving, rank=1, address=""), dataclasses.replace(serving, role="router")
    controller = SimpleNamespace(members=[serving, following, router], members_version=1)

    async def first() -> Any:
        return await anext(ControlService(cast(Controller, controller), "token").Watch(control_pb2.WatchRequest(name="r"), None))

    assert [decode_member(member) for member in asyncio.run(first()).members] == [serving]


def test_a_router_port_of_another_cluster_is_not_moved_to() -> None:
    """Routers share their port with whoever asks to share it: the kernel would give each half of the connections."""
    running = load_spec(LOCAL_CPU)
    with socket.socket() as theirs:
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        theirs.bind(("127.0.0.1", 0))
        theirs.listen()
        port = theirs.getsockname()[1]
        reply, wishes = applied(running, load_spec(LOCAL_CPU, [f"router.port={port}"]))
    assert not wishes and f"router.port: 127.0.0.1:{port} cannot be had" in str(decode_error(reply.error))
    reply, wishes = applied(running, load_spec(LOCAL_CPU, [f"router.port={port}"]))
    assert [spec.router.port for spec in wishes] == [port]


def test_the_port_that_a_cluster_has_is_no_obstacle_to_other_changes() -> None:
    with socket.socket() as own:
        own.bind(("127.0.0.1", 0))
        own.listen()
        running = load_spec(LOCAL_CPU, [f"router.port={own.getsockname()[1]}"])
        _, wishes = applied(running, running.scaled({"prefill": 2}))
    assert [spec.prefill.replicas for spec in wishes] == [2]


def test_a_replica_is_drained_by_its_name_or_that_of_one_of_its_ranks_and_no_other() -> None:
    spec, asked = load_spec(LOCAL_CPU, ["decode.ranks_per_replica=2", "decode.replicas=2"]), list[str]()
    fleet = Fleet(spec.placement)
    for index in (0, 1):
        fleet.adopt("decode", index, Phase.READY, "r", 0.0)
    fleet.ask_restart = lambda role, index: not asked.append(f"{role}/{index}")  # type: ignore[method-assign]

    async def drained(*members: str) -> list[Any]:
        service = ControlService(cast(Controller, SimpleNamespace(spec=spec, fleet=fleet, is_ending=False)), "token")
        return [await service.Drain(control_pb2.DrainRequest(member=member), None) for member in members]

    refused = asyncio.run(drained("decode/0.7", "decode/0.", "decode/00", "decode/2", "prefill/0", "decode", ""))
    assert not asked and "'decode/0.7' is no ready replica; those are decode/0, decode/1" in str(decode_error(refused[0].error))
    assert all(reply.HasField("error") for reply in refused)
    replies = asyncio.run(drained("decode/0", "decode/1.0", "decode/1.1"))
    assert asked == ["decode/0", "decode/1", "decode/1"] and list(replies[1].changes) == ["decode/1: drain, then restart"]

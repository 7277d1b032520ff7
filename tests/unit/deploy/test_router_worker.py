"""Router processes on one port: what each tells about itself."""

from __future__ import annotations

import asyncio
import pathlib
import urllib.error
import urllib.request

import pytest

from deploy.router_worker import RouterWorker
from deploy.spec import load_spec
from tests.support.ports import free_ports

FILE = pathlib.Path(__file__).resolve().parents[3] / "deploy" / "clusters" / "local_cpu.yaml"


def routers_at(address: str) -> set[str]:
    """Names of the router processes in a page of metrics."""
    with urllib.request.urlopen(f"http://{address}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    return {line.split('"')[1] for line in lines if line.startswith("baton_router_info{")}


def test_routers_that_share_a_port_have_metrics_at_ports_of_their_own() -> None:
    port, control = free_ports(2)
    spec = load_spec(FILE, [f"router.port={port}", f"router.control_address=127.0.0.1:{control}", "router.host=0.0.0.0"])

    async def live() -> None:
        workers = [RouterWorker(spec, index, "token", "127.0.0.1") for index in range(2)]
        members = [await worker.start() for worker in workers]
        assert {member.address for member in members} == {f"0.0.0.0:{port}"}
        names = [await asyncio.to_thread(routers_at, member.metrics_address) for member in members]
        assert all(len(name) == 1 for name in names) and names[0] != names[1]
        for worker in workers:
            await worker.stop()
            await worker.stop()
        for member in members:
            with pytest.raises(urllib.error.URLError, match="refused"):
                await asyncio.to_thread(routers_at, member.metrics_address)

    asyncio.run(live())

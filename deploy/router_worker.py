"""A router process, seen as a worker of the cluster."""

from __future__ import annotations

import asyncio

from core.clock import new_incarnation
from core.metrics import MetricsEndpoint
from core.request import Load, Member
from core.rpc import address_of
from deploy.spec import ClusterSpec
from router.members import watch_controller
from router.server import Router


class RouterWorker:
    """All router processes share one port, and the kernel chooses among them. So each has a second one for its metrics, as ranks do."""

    def __init__(self, spec: ClusterSpec, index: int, control_token: str, host: str) -> None:
        """`host`: this node's address for other members and for Prometheus."""
        self._spec, self._index, self._control_token, self._host = spec, index, control_token, host
        self._is_stopped = False

    async def start(self) -> Member:
        spec = self._spec
        self._router = Router(
            config=spec.router,
            served_name=spec.served_name,
            tokenizer_folder=spec.model.tokenizer_folder,
            max_model_len=spec.engine.max_model_len,
            watch=lambda members: watch_controller(spec.router.control_address, self._control_token, members),
            is_port_shared=True,
        )
        await self._router.start()
        self._endpoint = MetricsEndpoint(self._router.registry, self._host)
        return Member(
            role="router",
            replica=self._index,
            rank=0,
            address=address_of(spec.router.host, self._router.port),
            incarnation=new_incarnation(),
            metrics_address=self._endpoint.address,
        )

    def load(self) -> Load:
        return Load(num_running=self._router.num_requests)

    def note(self) -> str:
        return ""

    async def drain(self, deadline_s: float) -> bool:
        """Close the port to new connections; streams may end within router.drain_timeout_s."""
        await self.stop()
        return True

    async def stop(self) -> None:
        if not self._is_stopped:
            self._is_stopped = True
            await self._router.stop()
            await asyncio.to_thread(self._endpoint.close)

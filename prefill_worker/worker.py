"""A prefill rank, composed: engine, memory known to the transport, loop, gRPC server, metrics endpoint."""

from __future__ import annotations

import asyncio
import contextlib
import pathlib
from collections.abc import Callable

from prometheus_client import CollectorRegistry

from core.clock import SystemClock, new_incarnation
from core.errors import ConfigError
from core.log import get_logger
from core.metrics import MetricsEndpoint, new_registry
from core.request import Load, Member
from core.rpc import Listener
from engine.config import EngineConfig
from engine.engine import LoadedModel
from engine.memory import region_of
from engine.parallel.experts import Sharing
from engine.parallel.group import Rendezvous, Seat
from engine.parallel.membership import Membership
from engine.parallel.metrics import ExpertLoadCollector
from engine.parallel.rebalance import Rebalancer, new_rebalancer
from engine.parallel.steps import even_budget
from engine.runner import ModelRunner, Runner
from kv_transfer.config import TransferConfig
from kv_transfer.metrics import SenderMetrics
from kv_transfer.sending import KVSender
from prefill_worker.config import PrefillConfig
from prefill_worker.loop import PrefillLoop
from prefill_worker.metrics import PrefillMetrics
from prefill_worker.server import PrefillService
from protos import prefill_pb2_grpc

log = get_logger("prefill")

STOP_GRACE_S = 0.2
"""Sessions have so long to send what they still hold."""


class PrefillWorker:
    """One life of one rank: start once, stop once."""

    def __init__(
        self,
        *,
        model_path: pathlib.Path,
        engine: EngineConfig,
        config: PrefillConfig,
        transfer: TransferConfig,
        host: str = "127.0.0.1",
        port: int = 0,
        replica: int = 0,
        rank: int = 0,
        on_death: Callable[[str], None] = lambda reason: None,
        seat: Seat | None = None,
        rendezvous: Rendezvous | None = None,
        new_runner: Callable[[], Runner] | None = None,
    ) -> None:
        """`on_death(reason)`: the rank cannot go on and wants to be restarted. `seat`: in the group of its replica, if that has several
        ranks; rank 0 brings the `rendezvous`. `new_runner` replaces the model, for tests."""
        self._model_path, self._engine, self._config, self._transfer = model_path, engine, config, transfer
        self._seat, self._rendezvous = seat, rendezvous
        self._host, self._port, self._replica, self._rank = host, port, replica, rank
        self._on_death = on_death
        self._parts = contextlib.AsyncExitStack()
        """Ends what was started, the latest first."""
        self._new_runner = new_runner

    async def start(self) -> Member:
        """Load, register memory, listen; ready when it returns. Raises ConfigError and its kin, and then leaves nothing behind."""
        if (self._seat is None) != (self._config.ranks_per_replica == 1):
            ranks = self._config.ranks_per_replica
            raise ConfigError(f"prefill.ranks_per_replica is {ranks}; a group is started by the controller (`baton up`)")
        async with contextlib.AsyncExitStack() as parts:
            listener = Listener(self._host, self._port)
            parts.push_async_callback(listener.stop, STOP_GRACE_S)
            clock, registry = SystemClock(), new_registry()
            membership = await asyncio.to_thread(
                Membership.open, self._seat, self._rendezvous, self._engine, self._config.chunk_tokens, even_budget, clock
            )
            parts.push_async_callback(asyncio.to_thread, membership.close)
            runner, rebalancer = await asyncio.to_thread(self._load, membership, registry)
            endpoint = MetricsEndpoint(registry, self._host)
            parts.push_async_callback(asyncio.to_thread, endpoint.close)
            self.member = Member(
                role="prefill",
                replica=self._replica,
                rank=self._rank,
                address=f"{self._host}:{listener.port}",
                incarnation=new_incarnation(),
                fingerprint=runner.layout.fingerprint(),
                max_model_len=runner.max_model_len,
                metrics_address=endpoint.address,
            )
            self._loop = PrefillLoop(runner, self._config, PrefillMetrics(registry), membership.steps, clock, self._on_death)
            pages, slots = region_of(runner.arena.pages), region_of(runner.arena.slots)
            sender = KVSender(
                self._transfer,
                runner.layout,
                pages,
                slots,
                self.member,
                clock,
                SenderMetrics(registry),
                self._loop.transfer_event,
                self._on_death,
            )
            await sender.start()
            parts.push_async_callback(sender.close)
            self._sender = sender
            self._loop.start(sender)
            parts.push_async_callback(asyncio.to_thread, self._loop.stop)
            parts.push_async_callback(asyncio.to_thread, membership.leave)
            if rebalancer is not None:
                rebalancer.start()
                parts.push_async_callback(asyncio.to_thread, rebalancer.close)
            service = PrefillService(self._loop, self.member, self._config.liveness_timeout_s)
            prefill_pb2_grpc.add_PrefillServicer_to_server(service, listener.server)
            await listener.start()
            parts.push_async_callback(listener.stop, STOP_GRACE_S)
            self._parts = parts.pop_all()
        log.info("prefill.ready", member=self.member.name, address=self.member.address, incarnation=self.member.incarnation)
        return self.member

    def _load(self, membership: Membership, registry: CollectorRegistry) -> tuple[Runner, Rebalancer | None]:
        if self._new_runner is not None:
            return self._new_runner(), None
        sharing = None
        if membership.group is not None:
            sharing = Sharing(
                group=membership.group,
                max_tokens=self._config.chunk_tokens,
                is_latency_bound=False,
                num_redundant=self._config.redundant_experts,
            )
        loaded, config = LoadedModel.load(self._model_path, self._engine, sharing), self._config
        if loaded.share is not None:
            registry.register(ExpertLoadCollector("prefill", loaded.share))
        runner = ModelRunner(loaded, config.num_pages, config.num_slots, chunk_tokens=config.chunk_tokens)
        return runner, new_rebalancer(loaded, membership, self._on_death)

    def load(self) -> Load:
        return self._loop.load

    def note(self) -> str:
        """What its pages travel over."""
        return self._sender.links

    async def drain(self, deadline_s: float) -> bool:
        """Take no new work; True when none is left, False at the deadline."""
        self._loop.is_draining = True
        end = asyncio.get_running_loop().time() + deadline_s
        while not self._loop.is_idle and asyncio.get_running_loop().time() < end:
            await asyncio.sleep(0.05)
        return self._loop.is_idle

    async def stop(self) -> None:
        """End everything; whatever was running is lost to its routers, which run it again elsewhere. Harmless when not started."""
        await self._parts.aclose()

"""A prefill rank, composed: engine, loop, sender of KV memory, gRPC service."""

from __future__ import annotations

import asyncio
import pathlib
from collections.abc import Callable
from functools import partial

from prometheus_client import CollectorRegistry

from core.clock import SystemClock
from core.rank_worker import Place, RankWorker
from core.rpc import Listener
from engine.config import EngineConfig
from engine.following import run_following
from engine.memory import region_of
from engine.parallel.group import Rendezvous, Seat
from engine.parallel.steps import even_budget
from engine.rank_engine import RankEngine, Work
from engine.runner import ModelRunner, Runner
from kv_transfer.config import TransferConfig
from kv_transfer.metrics import SenderMetrics
from kv_transfer.sending import KVSender
from prefill_worker.config import PrefillConfig
from prefill_worker.loop import PrefillLoop
from prefill_worker.metrics import PrefillMetrics
from prefill_worker.server import PrefillService
from protos import prefill_pb2_grpc


class PrefillWorker(RankWorker):
    def __init__(
        self,
        *,
        model_path: pathlib.Path,
        engine: EngineConfig,
        config: PrefillConfig,
        transfer: TransferConfig,
        place: Place,
        on_death: Callable[[str], None],
        seat: Seat | None = None,
        rendezvous: Rendezvous | None = None,
        new_runner: Callable[[], Runner] | None = None,
    ) -> None:
        """`on_death(reason)`: the rank cannot go on and wants to be restarted. `seat`: in the group of its replica, if that has several
        ranks; rank 0 brings the `rendezvous`. `new_runner` replaces the model, for tests."""
        super().__init__(place)
        self._model_path, self._engine, self._config, self._transfer = model_path, engine, config, transfer
        self._on_death, self._seat, self._rendezvous, self._new_runner = on_death, seat, rendezvous, new_runner
        self._sender: KVSender | None = None

    async def _open(self, listener: Listener, registry: CollectorRegistry, metrics_address: str) -> None:
        config, clock, parts = self._config, SystemClock(), self._parts
        engine = await asyncio.to_thread(RankEngine.join, self._work(), self._seat, self._rendezvous, self._engine, clock)
        parts.push_async_callback(asyncio.to_thread, engine.close)
        runner = await asyncio.to_thread(self._new_runner or partial(engine.load, self._model_path, registry, self._on_death))
        self.member = self._place.member("prefill", listener.port, metrics_address, runner.layout, runner.max_model_len)
        if engine.following is not None:
            self._follow(run_following(engine, engine.following, parts, self._on_death), engine.following.leader)
            return
        loop = self._loop = PrefillLoop(runner, config, PrefillMetrics(registry), engine.steps, clock, self._on_death)
        sender = KVSender(
            self._transfer,
            runner.layout,
            region_of(runner.arena.pages),
            region_of(runner.arena.slots),
            self.member,
            clock,
            SenderMetrics(registry),
            loop.transfer_event,
            self._on_death,
        )
        await sender.start()
        parts.push_async_callback(sender.close)  # if the rank does not get as far as to answer
        self._sender = sender
        sender.add_to(listener.server)
        loop.start(sender)
        parts.push_async_callback(asyncio.to_thread, loop.stop)
        engine.start()
        parts.push_async_callback(asyncio.to_thread, engine.leave)
        self._threads = (loop.thread, sender.thread)
        service = PrefillService(loop, self.member, config.liveness_timeout_s)
        prefill_pb2_grpc.add_PrefillServicer_to_server(service, listener.server)

    async def _end_writes(self) -> None:
        if self._sender is not None:
            await self._sender.close()

    def note(self) -> str:
        """What its pages travel over."""
        return super().note() if self._sender is None else self._sender.links

    def _work(self) -> Work:
        config = self._config
        return Work(
            role="prefill",
            ranks_per_replica=config.ranks_per_replica,
            attention_tp=config.attention_tp,
            redundant_experts=config.redundant_experts,
            max_tokens=config.chunk_tokens,
            budget_of=even_budget,
            is_latency_bound=False,
            new_runner=lambda loaded: ModelRunner(
                loaded,
                config.num_pages,
                config.num_slots,
                chunk_tokens=config.chunk_tokens,
                widened_layers=config.widened_layers,
            ),
        )

"""A decode rank, composed: engine, loop, receiver of KV memory, gRPC service."""

from __future__ import annotations

import asyncio
import pathlib
from collections.abc import Callable
from functools import partial

from prometheus_client import CollectorRegistry

from core.clock import SystemClock
from core.log import get_logger
from core.rank_worker import Place, RankWorker
from core.rpc import Listener
from decode_worker.config import DecodeConfig
from decode_worker.loop import DecodeLoop
from decode_worker.metrics import DecodeMetrics
from decode_worker.server import DecodeService
from engine.config import EngineConfig
from engine.following import run_following
from engine.memory import region_of
from engine.parallel.group import Rendezvous, Seat
from engine.parallel.steps import batch_bucket
from engine.rank_engine import RankEngine, Work
from engine.runner import ModelRunner, Runner
from kv_transfer.config import TransferConfig
from kv_transfer.metrics import ReceiverMetrics
from kv_transfer.receiving import KVReceiver
from protos import decode_pb2_grpc

log = get_logger("decode")


class DecodeWorker(RankWorker):
    def __init__(
        self,
        *,
        model_path: pathlib.Path,
        engine: EngineConfig,
        config: DecodeConfig,
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

    async def _open(self, listener: Listener, registry: CollectorRegistry, metrics_address: str) -> None:
        config, clock, parts = self._config, SystemClock(), self._parts
        if config.most_running < config.max_running:
            log.warning("decode.max_running_lowered", max_running=config.max_running, num_slots=config.num_slots)
        engine = await asyncio.to_thread(RankEngine.join, self._work(), self._seat, self._rendezvous, self._engine, clock)
        parts.push_async_callback(asyncio.to_thread, engine.close)
        runner = await asyncio.to_thread(self._new_runner or partial(engine.load, self._model_path, registry, self._on_death))
        self.member = self._place.member("decode", listener.port, metrics_address, runner.layout, runner.max_model_len)
        if engine.following is not None:
            self._follow(run_following(engine, engine.following, parts, self._on_death), engine.following.leader)
            return
        metrics, lease_s = DecodeMetrics(registry), self._transfer.lease_s
        loop = self._loop = DecodeLoop(runner, config, lease_s, metrics, self.member, engine.steps, clock, self._on_death)
        receiver = KVReceiver(
            self._transfer,
            runner.layout,
            region_of(runner.arena.pages),
            region_of(runner.arena.slots),
            self.member,
            clock,
            ReceiverMetrics(registry),
            loop.transfer_event,
            self._on_death,
        )
        await receiver.start()
        parts.push_async_callback(receiver.close)
        receiver.add_to(listener.server)
        loop.start(receiver)
        parts.push_async_callback(asyncio.to_thread, loop.stop)
        engine.start()
        parts.push_async_callback(asyncio.to_thread, engine.leave)
        self._threads = (loop.thread, receiver.thread)
        service = DecodeService(loop, self.member, config.liveness_timeout_s)
        decode_pb2_grpc.add_DecodeServicer_to_server(service, listener.server)

    def _work(self) -> Work:
        config = self._config
        return Work(
            role="decode",
            ranks_per_replica=config.ranks_per_replica,
            attention_tp=config.attention_tp,
            redundant_experts=config.redundant_experts,
            max_tokens=config.most_running,
            budget_of=batch_bucket,
            is_latency_bound=True,
            new_runner=lambda loaded: ModelRunner(loaded, config.num_pages, config.num_slots, max_decode=config.most_running),
        )

"""The real modules with threads, streams, transport and page size of the simulation, for as long as a world runs."""

from __future__ import annotations

import contextlib
import logging
import types
from collections.abc import Callable, Iterator
from typing import Any

import core.prefix
import decode_worker.loop
import decode_worker.reservations
import engine.scheduler.decode
import engine.scheduler.prefill
import kv_transfer.own_transport
import kv_transfer.receiving
import kv_transfer.sending
import prefill_worker.job
import prefill_worker.loop
import router.members
import router.placement
import router.reserving
import router.service
from tests.sim.null_engine import PAGE_TOKENS
from tests.sim.ranks import Rank
from tests.sim.sessions import SimPeerSession, SimRankSession
from tests.sim.threads import SimOutbox, SimThread
from tests.sim.world import World


class _Ids:
    """In place of the module uuid: ids that follow from the seed."""

    def uuid4(self) -> types.SimpleNamespace:
        return types.SimpleNamespace(hex=f"{next(SimThread.current.request_numbers):08x}")


class _Transcriber(logging.Handler):
    """The real code's log lines become part of the transcript."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self._world = world

    def emit(self, record: logging.LogRecord) -> None:
        self._world.note(self._world.current, record.getMessage())


@contextlib.contextmanager
def simulated() -> Iterator[None]:
    """See above; and the code logs nothing."""
    replaced: list[tuple[Any, str, Any]] = []

    def put(module: Any, name: str, value: Any) -> None:
        replaced.append((module, name, getattr(module, name)))
        setattr(module, name, value)

    def open_transport(config: Any, name: str, pages: Any, slots: Any) -> tuple[Any, bytes]:
        rank = SimThread.current.current
        assert isinstance(rank, Rank)
        return rank.transport, rank.transport.register(pages, slots)

    for module in (prefill_worker.loop, decode_worker.loop, kv_transfer.sending, kv_transfer.receiving):
        put(module, "InboxThread", SimThread)
    for module in (
        core.prefix,
        prefill_worker.job,
        decode_worker.reservations,
        engine.scheduler.decode,
        engine.scheduler.prefill,
        router.placement,
    ):
        put(module, "PAGE_TOKENS", PAGE_TOKENS)
    put(kv_transfer.own_transport, "open_transport", open_transport)
    put(kv_transfer.sending, "PeerSession", SimPeerSession)
    put(kv_transfer.receiving, "Outbox", SimOutbox)
    put(router.reserving, "FULL_POLL_S", 0.06)
    put(router.members, "RankSession", SimRankSession)
    put(router.service, "uuid", _Ids())
    logger = logging.getLogger("baton")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)
        for module, name, value in reversed(replaced):
            setattr(module, name, value)


@contextlib.contextmanager
def transcribed(world: World) -> Iterator[None]:
    """What the code logs goes into the world's transcript."""
    logger, handler = logging.getLogger("baton"), _Transcriber(world)
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def run_world(seed: int, tell: Callable[[str], None] | None = None, set_up: Callable[[World], None] | None = None) -> World:
    """One history. Raises AssertionError, which names the broken rule."""
    world = World(seed, tell, set_up)
    with simulated(), transcribed(world) if world.has_transcript else contextlib.nullcontext():
        world.run()
    return world

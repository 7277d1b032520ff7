"""RankWorker: what the lives of prefill and decode ranks have in common. What each is made of is in `worker.py` of its folder."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from prometheus_client import CollectorRegistry

from core.clock import new_incarnation
from core.inbox import InboxThread
from core.kv_layout import KVLayout
from core.log import get_logger
from core.metrics import MetricsEndpoint, new_registry
from core.request import Load, Member
from core.rpc import Listener, address_of
from core.session import Outbox

log = get_logger("rank")

STOP_GRACE_S = 0.2
"""Sessions have so long to send what they still hold."""


LOOK_S, MOST_LOOKS = 5.0, 60
"""How often the rank looks at its threads, and how many times it may find one in the midst of the same order or turn: five minutes. It
counts looks, not seconds: of the time for which the whole process stands still only one passes."""


class Loop(Protocol):
    """A rank's engine thread. May be used from any thread."""

    load: Load
    is_draining: bool
    """Set by `RankWorker.drain`: no new work is taken."""

    @property
    def thread(self) -> InboxThread: ...

    @property
    def is_idle(self) -> bool:
        """Nothing is left of what was taken."""
        ...

    def session_closed(self, outbox: Outbox) -> None:
        """Cancel everything that came over a session."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Which rank of its role it is, and where it listens."""

    host: str = "127.0.0.1"
    port: int = 0
    """0: any free one."""
    replica: int = 0
    rank: int = 0

    def member(self, role: str, port: int, metrics_address: str, layout: KVLayout, max_model_len: int) -> Member:
        """A new life of the rank."""
        return Member(
            role=role,
            replica=self.replica,
            rank=self.rank,
            address=address_of(self.host, port),
            incarnation=new_incarnation(),
            fingerprint=layout.fingerprint(),
            max_model_len=max_model_len,
            metrics_address=metrics_address,
        )


class RankWorker:
    """One life of one rank: start once, stop once. A role says in `_open` what it is made of."""

    member: Member
    _loop: Loop
    _threads: Sequence[InboxThread]
    """That of the loop, and that of the rank's end of transfers."""
    _on_death: Callable[[str], None]

    def __init__(self, place: Place) -> None:
        self._place = place
        self._leader = ""
        self._parts = contextlib.AsyncExitStack()
        """Ends what was started, the latest first."""

    async def start(self) -> Member:
        """Ready when it returns. Raises ConfigError and its kin, and then leaves nothing behind."""
        host = self._place.host
        try:
            listener = Listener(host, self._place.port)
            self._parts.push_async_callback(listener.stop, STOP_GRACE_S)
            registry = new_registry()
            endpoint = MetricsEndpoint(registry, host)
            self._parts.push_async_callback(asyncio.to_thread, endpoint.close)
            await self._open(listener, registry, endpoint.address)
            watching = asyncio.create_task(watch(self._threads, self._on_death))
            self._parts.callback(watching.cancel)
            await listener.start()
            self._parts.push_async_callback(listener.stop, STOP_GRACE_S)  # no command comes any more while the parts end
            self._parts.push_async_callback(self._end_writes)
        except BaseException:
            await self.stop()
            raise
        log.info("rank.ready", member=self.member.name, address=self.member.address, incarnation=self.member.incarnation)
        return self.member

    async def _open(self, listener: Listener, registry: CollectorRegistry, metrics_address: str) -> None:
        """Set `member`, `_loop` and `_threads`, add services to the listener, and push onto `_parts` whatever has to be ended."""
        raise NotImplementedError

    def _follow(self, loop: Loop, leader: str) -> None:
        """The rank serves nobody itself: `loop` computes for the rank `leader`, and the routers are told no address."""
        self._loop, self._threads, self._leader = loop, (loop.thread,), leader
        self.member = dataclasses.replace(self.member, address="")

    async def _end_writes(self) -> None:
        """Write no other rank's memory any more: called before the port is freed, which others take for the end of all writes."""

    def load(self) -> Load:
        return self._loop.load

    def note(self) -> str:
        """What `baton status` says of it, if anything."""
        return f"computes heads for {self._leader}" if self._leader else ""

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


async def watch(threads: Sequence[InboxThread], stuck: Callable[[str], None]) -> None:
    """Returns when one of the threads stands still, in a step that a device does not end, say, and `stuck(reason)` was called. Nothing
    else would tell: the rank's sessions go on."""
    seen: dict[str, tuple[int | None, int]] = {}
    while True:
        await asyncio.sleep(LOOK_S)
        for thread in threads:
            before, looks = seen.get(thread.name, (None, 0))
            found = thread.progress
            looks = looks + 1 if found is not None and found == before else 0
            seen[thread.name] = found, looks
            if looks >= MOST_LOOKS:
                stuck(f"{thread.name} stands still: what it does takes over {looks * LOOK_S:g} s")
                return

"""A prefill rank, a decode rank and a router in this process, over real gRPC and real transfers;
no Ray. For tests of what they do together."""

from __future__ import annotations

import asyncio
import dataclasses
import pathlib
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import httpx

from core.rank_worker import Place
from core.request import Member
from decode_worker.config import DecodeConfig
from decode_worker.worker import DecodeWorker
from engine.config import EngineConfig
from engine.parallel.group import Rendezvous, Seat
from engine.runner import Runner
from kv_transfer.config import TransferConfig
from prefill_worker.config import PrefillConfig
from prefill_worker.worker import PrefillWorker
from router.config import RouterConfig
from router.server import Router
from tests.support.patience import overload
from tests.support.ranks import seats

T = TypeVar("T")

DEMO = pathlib.Path(__file__).resolve().parents[2] / "deploy" / "demo_model" / "checkpoint"


class Serving:
    """Start with `with Serving(...) as serving:`; the parts live on an event loop in a thread of their own."""

    def __init__(
        self,
        model: pathlib.Path = DEMO,
        *,
        num_prefill: int = 1,
        num_decode: int = 1,
        engine: EngineConfig | None = None,
        prefill: PrefillConfig | None = None,
        decode: DecodeConfig | None = None,
        transfer: TransferConfig | None = None,
        router: RouterConfig | None = None,
        new_runner: Callable[[str], Runner] | None = None,
    ) -> None:
        """`new_runner(role)` replaces the model."""
        self.model = model
        self._engine = engine or EngineConfig(device="cpu", max_model_len=4096)
        self._prefill, self._decode = prefill or PrefillConfig(), decode or DecodeConfig()
        self._transfer = transfer or TransferConfig(checksum=True)
        self._router = dataclasses.replace(router or RouterConfig(default_thinking=False), port=0)
        self._num = {"prefill": num_prefill, "decode": num_decode}
        self._new_runner = new_runner
        self.workers: dict[str, PrefillWorker | DecodeWorker] = {}
        self.members: dict[str, Member] = {}
        self.deaths: list[str] = []
        """Reasons of ranks that could not go on."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="serving", daemon=True)

    def run(self, work: Coroutine[Any, Any, T], timeout_s: float = 60.0) -> T:
        """Run a coroutine on the parts' loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout_s * overload())

    def __enter__(self) -> Serving:
        self._thread.start()
        self.run(self._start())
        self.url = f"http://127.0.0.1:{self.router.port}"
        # A pool that closes connections which have lain idle for 5 s can close one that another thread has just been given.
        limits = httpx.Limits(max_connections=100, max_keepalive_connections=100, keepalive_expiry=None)
        self.client = httpx.Client(base_url=self.url, timeout=120, trust_env=False, limits=limits)
        self.wait(lambda: self.client.get("/ready").status_code == 200)
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        self.run(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _start(self) -> None:
        for role, count in self._num.items():
            for replica in range(count):
                await self.add(role, replica)
        self.router = Router(
            config=self._router,
            served_name="demo",
            tokenizer_folder=self.model,
            max_model_len=self._engine.max_model_len,
            members=self._routed(),
        )
        await self.router.start()

    async def add(self, role: str, replica: int) -> Member:
        """Start one more replica, with all ranks of its group, and return its rank 0; the router has to be told with `announce`."""
        config = self._prefill if role == "prefill" else self._decode
        size = config.ranks_per_replica
        rendezvous, places = seats(size, f"{role}/{replica}") if size > 1 else (None, [None])
        workers = [self._worker(role, replica, seat, rendezvous if not rank else None) for rank, seat in enumerate(places)]
        members = await asyncio.gather(*(worker.start() for worker in workers))
        for worker, member in zip(workers, members, strict=True):
            self.workers[member.name], self.members[member.name] = worker, member
        return members[0]

    def _worker(self, role: str, replica: int, seat: Seat | None, rendezvous: Rendezvous | None) -> PrefillWorker | DecodeWorker:
        factory = None if self._new_runner is None else (lambda: self._new_runner(role))  # type: ignore[misc]
        shared: dict[str, Any] = {
            "model_path": self.model,
            "engine": self._engine,
            "transfer": self._transfer,
            "place": Place(replica=replica, rank=seat.rank if seat else 0),
            "seat": seat,
            "rendezvous": rendezvous,
            "on_death": self.deaths.append,
            "new_runner": factory,
        }
        if role == "prefill":
            return PrefillWorker(config=self._prefill, **shared)
        return DecodeWorker(config=self._decode, **shared)

    async def remove(self, name: str) -> None:
        """Stop a worker at once, as if its process had ended; the router is told."""
        await self.workers.pop(name).stop()
        del self.members[name]
        await self.announce()

    async def announce(self) -> None:
        self.router.members.update(self._routed())

    def _routed(self) -> list[Member]:
        """Those that take requests."""
        return [member for member in self.members.values() if member.address]

    async def _stop(self) -> None:
        await self.router.stop()
        await asyncio.gather(*(worker.stop() for worker in self.workers.values()))

    def wait(self, claim: Callable[[], bool], timeout_s: float = 20.0) -> None:
        """Fail unless the claim comes true in time."""
        began = time.monotonic()
        while not claim():
            loads = {name: worker.load() for name, worker in self.workers.items()}
            assert time.monotonic() < began + timeout_s * overload(), f"it did not come true in {timeout_s:g} s; {loads}"
            time.sleep(0.02)

    def is_empty(self) -> bool:
        """Whether every page and slot of every worker is free."""
        loads = [worker.load() for worker in self.workers.values()]
        return all(load.pages_free == load.pages_total and load.slots_free == load.slots_total for load in loads)

    def complete(self, **body: Any) -> dict[str, Any]:
        """POST /v1/completions; the answer, which must be 200."""
        response = self.client.post("/v1/completions", json={"model": "demo", **body})
        assert response.status_code == 200, f"{response.status_code}: {response.text}"
        answer: dict[str, Any] = response.json()
        return answer

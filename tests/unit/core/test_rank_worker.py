"""Ranks of both roles: starting, failing to start, stopping."""

from __future__ import annotations

import asyncio
import gc
import itertools
import pathlib
import socket
import threading
import time
import urllib.request
from collections.abc import Callable, Iterable
from typing import Any, cast

import pytest

import core.rank_worker
from core.errors import CheckpointError, ConfigError
from core.inbox import InboxThread
from core.rank_worker import Place
from core.rpc import Listener, new_channel
from decode_worker.config import DecodeConfig
from decode_worker.worker import DecodeWorker
from engine.config import EngineConfig
from engine.rank_engine import RankEngine
from engine.runner import Runner
from kv_transfer.config import TransferConfig
from kv_transfer.own_transport import OwnTransport
from prefill_worker.config import PrefillConfig
from prefill_worker.worker import PrefillWorker
from tests.support.null_runner import NullRunner
from tests.support.ports import free_ports, freed

ROLES: dict[str, Callable[..., PrefillWorker | DecodeWorker]] = {
    "prefill": lambda **options: PrefillWorker(config=PrefillConfig(num_pages=8, num_slots=2), **options),
    "decode": lambda **options: DecodeWorker(config=DecodeConfig(num_pages=8, num_slots=2), **options),
}


def new_worker(
    role: str,
    port: int,
    new_runner: Callable[[], Runner] = lambda: NullRunner(num_pages=8, num_slots=2),
    host: str = "127.0.0.1",
    on_death: Callable[[str], None] = pytest.fail,
) -> Any:
    return ROLES[role](
        model_path=pathlib.Path("none"),
        engine=EngineConfig(),
        transfer=TransferConfig(transport="memory"),
        place=Place(host=host, port=port),
        on_death=on_death,
        new_runner=new_runner,
    )


def fetch(url: str) -> bytes:
    with urllib.request.urlopen(url) as answer:
        page: bytes = answer.read()
        return page


def threads_since(before: set[threading.Thread]) -> list[str]:
    """Names of threads that were not there before. Those that were may be gone: other tests' may end, and a foreign thread of a library,
    once seen by `threading`, counts until a new thread happens to get its number. Those that are about to end have some seconds for it."""
    end = time.monotonic() + 10
    while True:
        gc.collect()  # gRPC ends its own thread with the last of its objects
        names = [thread.name for thread in threading.enumerate() if thread not in before]
        if not names or time.monotonic() > end:
            return names
        time.sleep(0.02)


@pytest.mark.parametrize("role", ROLES)
def test_a_stopped_rank_leaves_no_thread_and_its_port_can_be_taken_again(role: str) -> None:
    before, port = set(threading.enumerate()), free_ports(1)[0]

    async def live() -> None:
        for _ in range(2):
            worker = new_worker(role, port)
            member = await worker.start()
            assert member.address == f"127.0.0.1:{port}"
            page = await asyncio.to_thread(fetch, f"http://{member.metrics_address}/metrics")
            assert f"baton_{role}_".encode() in page
            await worker.stop()
            await worker.stop()
            await freed(port)

    asyncio.run(live())
    assert threads_since(before) == []


def test_a_decode_rank_makes_no_steps_larger_than_it_has_slots_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Graphs, and memory for steps, would be for nothing."""
    sizes: list[int] = []

    def new_runner(loaded: object, num_pages: int, num_slots: int, *, max_decode: int) -> Runner:
        sizes.append(max_decode)
        return NullRunner(num_pages=num_pages, num_slots=num_slots)

    monkeypatch.setattr("decode_worker.worker.ModelRunner", new_runner)
    monkeypatch.setattr(RankEngine, "load", lambda engine, *_: engine._work.new_runner(None))

    async def live() -> None:
        worker = new_worker("decode", 0)
        worker._new_runner = None
        await worker.start()
        sizes.append(worker._work().max_tokens)
        await worker.stop()

    asyncio.run(live())
    assert sizes == [2, 2]
    assert "decode.max_running_lowered max_running=16 num_slots=2" in caplog.text


@pytest.mark.parametrize("role", ROLES)
def test_a_rank_that_cannot_start_says_why_and_leaves_nothing_behind(role: str) -> None:
    before, port = set(threading.enumerate()), free_ports(1)[0]

    def broken() -> Runner:
        raise CheckpointError("model-1.safetensors: truncated")

    async def live() -> None:
        worker = new_worker(role, port, broken)
        with pytest.raises(CheckpointError, match="truncated"):
            await worker.start()
        await worker.stop()
        await freed(port)
        again = new_worker(role, port)
        await again.start()
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port}"):
            await new_worker(role, port, broken).start()  # the port is looked at before the model
        await again.stop()

    asyncio.run(live())
    assert threads_since(before) == []


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("place", [0, 1], ids=["engine", "transfers"])
def test_a_rank_is_given_up_when_a_thread_of_it_stands_still(monkeypatch: pytest.MonkeyPatch, role: str, place: int) -> None:
    """Its sessions and reports go on meanwhile, so nobody else would notice."""
    monkeypatch.setattr(core.rank_worker, "LOOK_S", 0.005)
    monkeypatch.setattr(core.rank_worker, "MOST_LOOKS", 8)

    async def live() -> None:
        told: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        goes_on = threading.Event()
        worker = new_worker(role, 0, on_death=told.set_result)
        await worker.start()
        thread = worker._threads[place]
        thread.put(lambda: cast(None, goes_on.wait(20)))
        reason = await asyncio.wait_for(told, 20)
        assert reason.startswith(f"{thread.name} stands still"), reason
        goes_on.set()
        await worker.stop()

    asyncio.run(live())


class ScriptedThread:
    name = "scripted"

    def __init__(self, progress: Iterable[int | None]) -> None:
        self._progress = iter(progress)

    @property
    def progress(self) -> int | None:
        return next(self._progress)


def test_a_thread_that_waits_or_goes_on_does_not_stand_still(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core.rank_worker, "LOOK_S", 0.0)
    monkeypatch.setattr(core.rank_worker, "MOST_LOOKS", 3)
    long, told = [[None] * 9, [1] * 3, [2] * 3, [None], [2] * 3, range(3, 20), [20] * 4], list[str]()
    thread = ScriptedThread(itertools.chain(*long))
    asyncio.run(core.rank_worker.watch([cast(InboxThread, thread)], told.append))
    assert told == ["scripted stands still: what it does takes over 0 s"]
    assert not list(thread._progress), "it was given up at the last look, and not before"


def has_ipv6() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


@pytest.mark.skipif(not has_ipv6(), reason="no IPv6 here")
@pytest.mark.parametrize("role", ROLES)
def test_a_rank_lives_at_an_ipv6_address_as_others_can_reach_it(role: str) -> None:
    async def live() -> None:
        worker = new_worker(role, 0, host="::1")
        member = await worker.start()
        assert member.address.startswith("[::1]:") and member.metrics_address.startswith("[::1]:")
        assert b"baton_" in await asyncio.to_thread(fetch, f"http://{member.metrics_address}/metrics")
        async with new_channel(member.address) as channel:
            await asyncio.wait_for(channel.channel_ready(), 10)
        await worker.stop()

    asyncio.run(live())


def test_a_prefill_rank_writes_no_more_when_its_port_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Receivers take a port that refuses for the end of all writes."""
    ended: list[str] = []

    def record(kind: type, name: str) -> None:
        true_call = getattr(kind, name)

        async def call(self: Any, *args: Any) -> None:
            await true_call(self, *args)
            ended.append(kind.__name__)

        monkeypatch.setattr(kind, name, call)

    record(OwnTransport, "close")
    record(Listener, "stop")

    async def run() -> None:
        worker = new_worker("prefill", free_ports(1)[0])
        await worker.start()
        assert not ended
        await worker.stop()

    asyncio.run(run())
    assert ended.index("OwnTransport") < ended.index("Listener")

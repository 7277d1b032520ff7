"""`direct` without GPUs: its kernels between processes, interpreted; and how ranks open it, or agree that they cannot."""

from __future__ import annotations

import concurrent.futures
import ctypes
import json
import os
import re
import subprocess
import sys
import threading
from typing import Any

import pytest
import torch

from core.errors import ConfigError
from engine.ops.expert_exchange import ExchangeShape
from engine.parallel.group import Group
from engine.parallel.peer_memory import GRANULE, PeerMemory
from tests.support.patience import overload
from tests.support.ranks import run_group

RANKS = 3
CONTEXT = 0x5EED


def test_tokens_arrive_and_sums_return_while_ranks_run_apart_until_one_falls_silent() -> None:
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "tests.support.direct_ranks", str(RANKS), "640"]
    environment, timeout_s = {**os.environ, "TRITON_INTERPRET": "1"}, 120 * overload()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False)
    assert done.returncode == 0, done.stderr
    ranks = [json.loads(line) for line in done.stdout.splitlines()]
    assert [rank["problem"] for rank in ranks] == [None] * RANKS
    assert all(rank["is_empty"] for rank in ranks), "what has been read is empty again"
    told = {rank["rank"]: (rank["lost"], rank["nan"]) for rank in ranks}
    assert told.pop(1) == ("", False)
    assert told == {rank: (f"decode/0.{rank}: a rank of its group did not send its tokens or sums in time", True) for rank in (0, 2)}


@pytest.mark.parametrize("seconds", [0.001, 0.5, 20.0, 3600.0])
def test_a_rank_waits_as_long_as_it_may_and_hardly_longer(seconds: float) -> None:
    pytest.importorskip("triton")
    from engine.ops.expert_exchange.direct import ticks_of
    from engine.ops.expert_exchange.triton_direct import TICK_BITS

    ticks, tick_s = ticks_of(seconds), 2**TICK_BITS.value / 1e9
    shortest, longest = (ticks - 1) * tick_s, (ticks + 1) * tick_s  # by when the clock ticks
    assert seconds <= shortest and longest <= seconds + 0.004


class Driver:
    """libcuda of one rank: memory of rank r lies at r << 32 for itself, and 1 << 60 further for others. A context is current in the thread
    that makes this, and in no other."""

    def __init__(self, rank: int, refuses: dict[str, int] | None = None) -> None:
        self._rank, self._refuses = rank, refuses or {}
        self.held: set[int] = set()
        self.num_bytes = 0
        self._threads = {threading.get_ident()}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return lambda *arguments: self._refuses.get(name) or self._called(name, *(getattr(a, "_obj", a) for a in arguments))

    def _called(self, name: str, *arguments: Any) -> int:
        if name != "cuCtxSetCurrent" and threading.get_ident() not in self._threads:
            return 201
        getattr(self, f"_{name}")(*arguments)
        return 0

    def _cuCtxGetCurrent(self, context: Any) -> None:
        context.value = CONTEXT

    def _cuCtxSetCurrent(self, context: Any) -> None:
        assert context.value == CONTEXT
        self._threads.add(threading.get_ident())

    def _cuMemAlloc_v2(self, address: Any, size: Any) -> None:
        address.value, self.num_bytes = (self._rank + 1) << 32, size.value
        self.held.add(address.value)

    def _cuMemsetD8_v2(self, address: Any, value: Any, size: Any) -> None:
        assert (address.value, value.value, size.value) == ((self._rank + 1) << 32, 0xFF, self.num_bytes)

    def _cuCtxSynchronize(self) -> None:
        """It is done."""

    def _cuIpcGetMemHandle(self, handle: Any, address: Any) -> None:
        text = b"\x00 %d \x00" % address.value
        ctypes.memmove(ctypes.addressof(handle), text, len(text))

    def _cuIpcOpenMemHandle_v2(self, address: Any, handle: Any, flags: Any) -> None:
        assert ctypes.sizeof(handle) == 64 and flags.value == 1
        address.value = int(ctypes.string_at(ctypes.addressof(handle), 64).strip(b"\x00 ")) + (1 << 60)
        self.held.add(address.value)

    def _cuIpcCloseMemHandle(self, address: Any) -> None:
        self.held.remove(address.value)

    def _cuMemFree_v2(self, address: Any) -> None:
        assert self.held == {address.value}, "peers' memory is closed before"
        self.held.clear()


def test_all_ranks_map_all_memory_and_give_it_back_from_any_thread() -> None:
    def rank(group: Group) -> tuple[tuple[int, ...], set[int]]:
        driver = Driver(group.rank)
        memory = PeerMemory(group, GRANULE + 1, driver)
        assert driver.num_bytes == 2 * GRANULE and len(driver.held) == RANKS
        with concurrent.futures.ThreadPoolExecutor(1) as another_thread:
            another_thread.submit(memory.close).result()
        return memory.addresses, driver.held

    for number, (addresses, held) in enumerate(run_group(RANKS, rank)):
        assert addresses == tuple((other + 1 << 32) + (0 if other == number else 1 << 60) for other in range(RANKS))
        assert held == set()


@pytest.mark.parametrize(
    ("refuses", "host", "says"),
    [
        ({"cuIpcOpenMemHandle_v2": 217}, "", r"^decode/0\.1: cuIpcOpenMemHandle_v2 failed with CUDA error 217 for the memory of rank 0$"),
        ({"cuMemAlloc_v2": 2}, "", r"^decode/0\.1: cuMemAlloc_v2 failed with CUDA error 2$"),
        ({}, "elsewhere", "^the ranks are on several hosts$"),
    ],
)
def test_what_keeps_one_rank_from_it_is_known_to_all(refuses: dict[str, int], host: str, says: str) -> None:
    def rank(group: Group) -> set[int]:
        driver = Driver(group.rank, refuses if group.rank == 1 else None)
        with pytest.raises(ConfigError, match=says):
            PeerMemory(group, 1, driver, host if group.rank == 1 else "")
        return driver.held

    assert run_group(RANKS, rank) == [set()] * RANKS


class Stream:
    def __init__(self) -> None:
        self.waited_for: list[Stream] = []

    def wait_stream(self, other: Stream) -> None:
        self.waited_for.append(other)


def test_a_call_on_another_stream_waits_for_the_last_one(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from engine.ops.expert_exchange.direct import InOrder

    first, second, captured = Stream(), Stream(), Stream()
    current = [first]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: current[0])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: current[0] is captured)
    order = InOrder(torch.device("cuda", 0))
    for stream in (first, second, second, captured, second, first, first):
        current[0] = stream
        order.join()
    assert (first.waited_for, second.waited_for, captured.waited_for) == ([second], [first], [])


@pytest.mark.parametrize("is_named", [False, True])
def test_ranks_that_cannot_reach_each_other_gather_unless_the_file_says_direct(is_named: bool) -> None:
    pytest.importorskip("triton")
    from engine.ops.expert_exchange.direct import direct_or

    shape = ExchangeShape(hidden_size=64, num_slots=8, max_tokens=4, is_latency_bound=True)
    others: Any = object()

    def rank(group: Group) -> str:
        driver = Driver(group.rank, {"cuIpcGetMemHandle": 800} if group.rank else None)
        try:
            assert direct_or(others, group, shape, torch.device("cpu"), driver, is_named) is others
        except ConfigError as error:
            return str(error)
        return "gathers"

    found = run_group(2, rank)
    if not is_named:
        assert found == ["gathers"] * 2
        return
    assert found[0] == found[1]
    says = r"^engine\.ops\.expert_exchange: direct cannot serve decode/0: decode/0\.1: cuIpcGetMemHandle .* 800; choose gather"
    assert re.search(says, found[0]), found[0]

"""A cancel storm: many streams on a router, a prefill and a decode rank without a model, most of which leave at the same moment.

with StormServing(num_streams=1050, step_s=0.5) as serving:
    print(asyncio.run(storm(serving, num_cancelled=1000, num_survivors=50)))
"""

from __future__ import annotations

import asyncio
import itertools
import json
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from decode_worker.config import DecodeConfig
from engine.config import EngineConfig
from engine.runner import Runner
from kv_transfer.config import TransferConfig
from prefill_worker.config import PrefillConfig
from router.config import RouterConfig
from tests.support.null_runner import NullRunner
from tests.support.serving import Serving


class StormServing(Serving):
    """Room for `num_streams` sequences of two pages at once; a decode step takes `step_s` and what the checks of NullRunner take."""

    def __init__(self, num_streams: int, step_s: float) -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft < 4 * num_streams:  # both ends of each connection are in this process
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(max(soft, 4 * num_streams), hard), hard))
        prefill = PrefillConfig(num_pages=num_streams, num_slots=num_streams, chunk_tokens=1024)
        decode = DecodeConfig(num_pages=2 * num_streams, num_slots=num_streams, max_running=num_streams)

        def new_runner(role: str) -> Runner:
            section = prefill if role == "prefill" else decode
            wait_s = step_s if role == "decode" else 0.0
            return NullRunner(num_pages=section.num_pages, num_slots=section.num_slots, max_model_len=512, step_s=wait_s)

        super().__init__(
            engine=EngineConfig(device="cpu", max_model_len=512),
            prefill=prefill,
            decode=decode,
            transfer=TransferConfig(transport="memory"),
            router=RouterConfig(default_thinking=False, max_requests=num_streams, liveness_timeout_s=20.0),
            new_runner=new_runner,
        )

    @property
    def pages_taken(self) -> int:
        load = self.workers["decode/0.0"].load()
        return load.pages_total - load.pages_free


@dataclass(slots=True)
class Stream:
    """One streamed completion over a connection of its own."""

    number: int
    token_times: list[float] = field(default_factory=list)
    writer: asyncio.StreamWriter | None = None
    error: str = ""

    async def run(self, port: int, max_tokens: int) -> None:
        """Ends when the stream does, or was aborted."""
        reader, self.writer = await asyncio.open_connection("127.0.0.1", port, limit=2**20)
        body = {"model": "demo", "prompt": [5, self.number % 500], "max_tokens": max_tokens, "stream": True, "ignore_eos": True}
        body |= {"logprobs": 0}  # then every token is an event, though its bytes may be no whole character yet
        content = json.dumps(body).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
        self.writer.write(head.encode() + content)
        try:
            while line := await reader.readline():
                if line.startswith(b"HTTP/1.1 ") and not line.startswith(b"HTTP/1.1 200"):
                    self.error = line.decode()
                if line.startswith(b"data: {"):
                    if b'"error"' in line:
                        self.error = line.decode()
                    self.token_times.append(time.perf_counter())
                if line.startswith(b"data: [DONE]"):
                    return
        except ConnectionError:
            return

    def abort(self) -> None:
        assert self.writer is not None
        self.writer.transport.abort()


@dataclass(frozen=True, kw_only=True, slots=True)
class Storm:
    """Seconds. Gaps are those between two tokens of a survivor."""

    pages_before: int
    free_s: float
    """From the first connection cut to the last page of the cancelled free."""
    gaps_before: list[float]
    gaps_after: list[float]
    """Of the time in which the pages came free, and as long again as was watched before."""
    num_survivor_errors: int


async def storm(serving: StormServing, *, num_cancelled: int, num_survivors: int, watch_s: float = 4.0) -> Storm:
    """Start all, watch the survivors for `watch_s`, cut the others, watch again."""
    streams = [Stream(number) for number in range(num_cancelled + num_survivors)]
    survivors = streams[:: len(streams) // num_survivors][:num_survivors]
    leaving = [stream for stream in streams if stream not in survivors]
    tasks = [asyncio.create_task(stream.run(serving.router.port, 500)) for stream in streams]
    await until(lambda: all(stream.token_times or stream.error for stream in streams), 120.0)
    assert not any(stream.error for stream in streams), next(stream.error for stream in streams if stream.error)
    await until(lambda: all(len(stream.token_times) > 2 for stream in streams), 60.0)
    began = time.perf_counter()
    await asyncio.sleep(watch_s)
    pages_before = serving.pages_taken
    cut = time.perf_counter()
    for stream in leaving:
        stream.abort()
    await until(lambda: serving.pages_taken <= 2 * num_survivors, 60.0)
    freed = time.perf_counter()
    await asyncio.sleep(watch_s)
    ended = time.perf_counter()
    for stream in survivors:
        stream.abort()
    await asyncio.gather(*tasks)
    return Storm(
        pages_before=pages_before,
        free_s=freed - cut,
        gaps_before=gaps(survivors, began, cut),
        gaps_after=gaps(survivors, cut, ended),
        num_survivor_errors=sum(bool(stream.error) for stream in survivors),
    )


def gaps(streams: list[Stream], start: float, end: float) -> list[float]:
    """Times between two tokens of a stream, of which the second came in [start, end); for one that stands still, its time since."""
    found = []
    for stream in streams:
        times = [when for when in stream.token_times if when < end]
        whole = [b - a for a, b in itertools.pairwise(times) if b >= start]
        is_still = end - times[-1] > max(whole, default=0.0)
        found += [*whole, end - times[-1]] if is_still else whole
    return found


def quantile(values: list[float], part: float) -> float:
    return sorted(values)[min(int(len(values) * part), len(values) - 1)]


async def until(claim: Callable[[], bool], timeout_s: float) -> None:
    end = time.monotonic() + timeout_s
    while not claim():
        assert time.monotonic() < end, "it did not come true in time"
        await asyncio.sleep(0.01)

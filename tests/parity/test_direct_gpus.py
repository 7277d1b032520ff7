"""`direct` between GPUs, each rank a process that sees its own alone: a thousand replays of graphs of several sizes, with loads that change
and ranks that run apart, and calls on several streams, to the bit; and a rank that falls silent."""

from __future__ import annotations

import os
import random
import threading
import time
from typing import Any

import pytest
import torch

from core.clock import SystemClock
from core.errors import GroupLost
from engine.config import EngineConfig
from engine.model.quantized import QuantizedRows
from engine.ops.expert_exchange import ExchangeShape, Tokens
from engine.ops.fp8_linear import quantize_rows
from engine.ops.registry import bind, get_op, load_backend
from engine.parallel.expert_placement import SlotChoice, balanced_placement
from engine.parallel.group import Group, Limits, Rendezvous, Seat
from engine.parallel.lockstep import GroupSteps

pytestmark = [pytest.mark.gpu, pytest.mark.multi_gpu]

HIDDEN, EXPERTS, TOP_K, REDUNDANT = 4096, 64, 6, 8
SIZES = (1, 3, 32, 256)
"""Tokens of each rank, a graph each; all through the same inboxes."""
REPLAYS = 1000
PLACEMENT_OF = {
    size: balanced_placement([float(1 + expert % 7) for expert in range(EXPERTS)], size, (EXPERTS + REDUNDANT) // size) for size in (2, 4)
}


def joined(rank: int, size: int, rendezvous: str, step_s: float) -> tuple[Group, Any, SlotChoice]:
    """The group, the exchange, and which copies this rank uses."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(size)))).split(",")
    os.environ["CUDA_VISIBLE_DEVICES"] = visible[rank]
    torch.cuda.set_device(0)
    group = Group.join(Seat(rank=rank, size=size, name="t/0", host="127.0.0.1", rendezvous=rendezvous), Limits(start_s=60, step_s=step_s))
    shape = ExchangeShape(hidden_size=HIDDEN, num_slots=EXPERTS + REDUNDANT, max_tokens=SIZES[-1], is_latency_bound=True)
    ops = bind(EngineConfig(device="cuda"), torch.device("cuda", 0))
    exchange = load_backend(get_op("expert_exchange"), "direct")[0](group, shape, ops)
    assert type(exchange).__name__ == "DirectExchange", "the ranks have agreed that they cannot reach each other"
    return group, exchange, SlotChoice(PLACEMENT_OF[size], rank, torch.device("cuda", 0))


class Step:
    """A graph for so many tokens, in bf16 or FP8: their experts multiply by a number of their rank's."""

    def __init__(self, exchange: Any, choice: SlotChoice, rank: int, tokens: int, is_quantized: bool = False) -> None:
        self.x = torch.zeros(tokens, HIDDEN, dtype=torch.bfloat16, device="cuda")
        self.ids = torch.zeros(tokens, TOP_K, dtype=torch.int64, device="cuda")
        self.weights = torch.zeros(tokens, TOP_K, device="cuda")
        self.positions = torch.zeros(tokens, dtype=torch.int64, device="cuda")
        self.quantized = QuantizedRows.empty(tokens, HIDDEN, torch.bfloat16, self.x.device) if is_quantized else None

        def body() -> torch.Tensor:
            arrived = exchange.dispatch(Tokens(self.x, self.ids, self.weights, self.positions, self.quantized), choice)
            rows = wide(arrived.x).unsqueeze(1) * arrived.weights.unsqueeze(2) * (1.0 + rank / 3)
            return exchange.combine(rows, arrived)

        self.body = body
        stream, self.graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            body()
        torch.cuda.synchronize()
        with torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"):
            self.out = body()

    def draw(self, is_idle: bool) -> None:
        """On the device; weights are multiples of 1/64, so that their sums are exact."""
        self.x.normal_()
        if self.quantized is not None:
            rows = quantize_rows(self.x)
            self.quantized.codes.copy_(rows.codes)
            self.quantized.scale.copy_(rows.scale)
        self.ids.copy_(torch.rand(len(self.x), EXPERTS, device="cuda").argsort(1)[:, :TOP_K])
        self.weights.copy_(torch.randint(1, 64, self.weights.shape, device="cuda") / 64)
        self.positions.copy_(torch.arange(len(self.x), device="cuda") if not is_idle else -1)
        if not is_idle and len(self.x) > 1:
            self.positions[::5] = -1

    def expected(self, choice: SlotChoice, size: int) -> torch.Tensor:
        slots = torch.where(self.positions[:, None] >= 0, choice(self.ids), -1)
        total, x = torch.zeros(len(self.x), HIDDEN, device="cuda"), wide(self.x if self.quantized is None else self.quantized)
        for rank in range(size):
            is_there = (slots >= 0) & (slots // PLACEMENT_OF[size].slots_per_rank == rank)
            part = torch.zeros_like(total)
            for place in range(TOP_K):
                part += (x * self.weights[:, place, None] * (1.0 + rank / 3)).masked_fill(~is_there[:, place, None], 0.0)
            total += part
        return total


def wide(x: torch.Tensor | QuantizedRows) -> torch.Tensor:
    return x.float() if isinstance(x, torch.Tensor) else x.double().float()


def take_streams_in_turn(step: Step, choice: SlotChoice, size: int) -> None:
    """Nobody has the streams wait for each other."""
    step.draw(is_idle=False)
    torch.cuda.synchronize()
    streams, found = [torch.cuda.Stream() for _ in range(3)], []
    for turn in range(60):
        with torch.cuda.stream(streams[turn % 3]):
            found.append(step.body())
    torch.cuda.synchronize()
    expected = step.expected(choice, size)
    assert [turn for turn, one in enumerate(found) if not torch.equal(one, expected)] == []


def replay(rank: int, size: int, rendezvous: str) -> None:
    group, exchange, choice = joined(rank, size, rendezvous, 60.0)
    steps = [Step(exchange, choice, rank, tokens, is_quantized) for tokens in reversed(SIZES) for is_quantized in (False, True)]
    order, pace = random.Random(7), random.Random(rank)
    torch.manual_seed(rank)
    for step in steps:
        take_streams_in_turn(step, choice, size)
    exchange.check()
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    for turn in range(REPLAYS):
        step, idle = order.choice(steps), order.randrange(3 * size)
        step.draw(is_idle=idle == rank)
        if pace.random() < 0.1:
            torch.cuda.synchronize()
            time.sleep(pace.random() * 2e-3)
        for _ in range(order.choice((1, 1, 4))):  # what the last one leaves is what the next one finds
            step.graph.replay()
        wrong += (step.out != step.expected(choice, size)).any()
        if turn % 250 == 249:
            assert int(wrong) == 0, f"rank {rank}, {int(wrong)} of the last 250 replays before {turn + 1}"
            exchange.check()
    exchange.close()
    group.close()


def fall_silent(rank: int, size: int, rendezvous: str, end: str) -> None:
    """Rank 1 does not come to the second replay. The others wait until the host knows, until rank 1 has left, or as long as they may."""
    group, exchange, choice = joined(rank, size, rendezvous, 3.0 if end == "waits" else 30.0)
    steps = GroupSteps(group, max, SystemClock())
    steps.start(lambda: None, pytest.fail)
    step = Step(exchange, choice, rank, 3)
    step.draw(is_idle=False)
    step.graph.replay()
    torch.cuda.synchronize()
    exchange.check()
    group.barrier()
    if rank == 1 and end == "leaves":
        time.sleep(0.3)
        steps.close()
    if rank != 1:
        if end == "is told":
            threading.Timer(0.2, group.lose).start()
        began = time.monotonic()
        step.graph.replay()
        step.graph.replay()
        torch.cuda.synchronize()
        seconds = time.monotonic() - began
        print(f"rank {rank}: {end}, ended after {seconds:.3f} s", flush=True)
        assert 3.0 <= seconds < 3.5 if end == "waits" else 0.1 < seconds < 1.0
        assert bool(step.out.isnan().all()), "sums without a rank's"
        with pytest.raises(GroupLost):
            exchange.check()
    group.store.set(f"done/{rank}", "")
    for other in range(size):
        group.store.get(f"done/{other}")


@pytest.mark.parametrize("size", [2, 4])
def test_replays_give_the_sums_of_all_ranks(size: int) -> None:
    if torch.cuda.device_count() < size:
        pytest.skip(f"needs {size} GPUs")
    rendezvous = Rendezvous("127.0.0.1")
    torch.multiprocessing.spawn(replay, (size, rendezvous.address), nprocs=size)


@pytest.mark.parametrize("end", ["is told", "leaves", "waits"])
def test_a_silent_rank_ends_the_wait(end: str) -> None:
    rendezvous = Rendezvous("127.0.0.1")
    torch.multiprocessing.spawn(fall_silent, (2, rendezvous.address, end), nprocs=2)

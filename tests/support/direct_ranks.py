"""`direct` without a GPU: ranks as processes with inboxes in shared memory, its kernels interpreted.

    TRITON_INTERPRET=1 python -m tests.support.direct_ranks RANKS HIDDEN

Each rank takes COUNTS steps, one after the other, at its own pace, tokens in FP8 in odd ones, and compares what it gets with what all
ranks' tokens say. Then rank 1 falls silent between a dispatch and its combine. Prints a JSON line a rank: {"rank", "problem": null or
text, "is_empty": all inboxes, before that step; "lost": what was raised then, "nan": whether what the step made is all NaN}.
"""

from __future__ import annotations

import argparse
import json
import mmap
import multiprocessing
import os
import random
import time
import traceback
from typing import Any

import torch

from core.errors import GroupLost
from engine.model.quantized import QuantizedRows
from engine.ops.exchange_unpack import places_here
from engine.ops.expert_exchange import ExchangeShape, Tokens, triton_direct
from engine.ops.expert_exchange.direct import DirectExchange, Inbox
from engine.ops.fp8_linear import quantize_rows
from engine.ops.moe_experts import Rooms
from engine.parallel.expert_placement import ExpertPlacement, SlotChoice, balanced_placement
from engine.parallel.group import Limits, Seat

COUNTS = (1, 3, 2, 0, 5, 1)
"""Tokens of each rank, step by step."""
EXPERTS, TOP_K, MOST = 8, 3, 5
LOOKS = 16
"""At an inbox, for a tick: the interpreter takes its time for each."""
PATIENCE = 3
"""Ticks before the silent rank is given up."""


class Ranks:
    """The group, as far as the exchange asks it."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size, self.limits = rank, size, Limits(start_s=60.0, step_s=60.0)
        self.seat = Seat(rank=rank, size=size, name="decode/0", host="", rendezvous="")

    def when_lost(self, call: Any) -> None:
        self.give_up = call


def tokens_of(rank: int, step: int, hidden: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """x bf16, ids, weights, positions. Every third row fills up, and so do all of the last rank's in odd steps; some words look EMPTY."""
    count, draw = COUNTS[step], torch.Generator().manual_seed(1000 * step + rank)
    x = torch.randn(count, hidden, generator=draw).bfloat16()
    if count:
        x.view(torch.int16)[0, :2] = -1
    ids = torch.rand(count, EXPERTS, generator=draw).argsort(1)[:, :TOP_K].contiguous()
    positions = torch.arange(count)
    positions[::3] = -1 if count > 1 else 7
    if rank == 1 and step % 2:
        positions[:] = -1
    return x, ids, torch.rand(count, TOP_K, generator=draw), positions


def quantized_of(x: torch.Tensor) -> QuantizedRows:
    """With a word that looks EMPTY."""
    rows = quantize_rows(x.nan_to_num(9.0))
    rows.codes.view(torch.int32)[:1, :1] = -1
    return rows


def values(x: torch.Tensor | QuantizedRows) -> torch.Tensor:
    """fp32, with scales if there are; NaN is 9."""
    return torch.cat((x.codes.float(), x.scale), dim=1).nan_to_num(9.0) if isinstance(x, QuantizedRows) else x.float().nan_to_num(9.0)


def rows_of(rank: int, step: int, size: int, hidden: int) -> torch.Tensor:
    """bf16: what a rank's experts make of the rows of all ranks; magnitudes differ, so that the order of additions tells."""
    draw = torch.Generator().manual_seed(5000 + 1000 * step + rank)
    rows = torch.randn(size * COUNTS[step], TOP_K, hidden, generator=draw) * 10.0 ** (rank % 3)
    return (rows * 7.0 ** torch.arange(TOP_K)[:, None]).bfloat16()


def take_steps(exchange: DirectExchange, rank: int, size: int, hidden: int, placement: ExpertPlacement) -> None:
    """Raises AssertionError or GroupLost."""
    choices = [SlotChoice(placement, other) for other in range(size)]
    pace = random.Random(rank)
    for step, count in enumerate(COUNTS):
        time.sleep(pace.choice((0, 0, 0.002)))
        mine = tokens_of(rank, step, hidden)
        arrived = exchange.dispatch(Tokens(*mine, quantized_of(mine[0]) if step % 2 else None), choices[rank])
        drawn = [tokens_of(other, step, hidden) for other in range(size)]
        slots = torch.cat([torch.where(one[3][:, None] >= 0, choice(one[1]), -1) for one, choice in zip(drawn, choices, strict=True)])
        exchange.check()
        expected = [quantized_of(one[0]) if step % 2 else one[0] for one in drawn]
        assert isinstance(arrived.x, type(expected[0])) and not isinstance(arrived.x, Rooms), f"step {step}: {type(arrived.x)}"
        assert arrived.ids is not None and arrived.weights is not None
        assert torch.equal(values(arrived.x), torch.cat([values(one) for one in expected])), f"step {step}: values"
        assert torch.equal(arrived.ids, places_here(slots, rank, placement.slots_per_rank)), f"step {step}: slots"
        assert torch.equal(arrived.weights, torch.cat([one[2] for one in drawn])), f"step {step}: weights"
        time.sleep(pace.choice((0, 0, 0.002)))
        found = exchange.combine(rows_of(rank, step, size, hidden).masked_fill((arrived.ids < 0)[..., None], torch.nan), arrived)
        exchange.check()
        total = torch.zeros(count, hidden)
        own = slice(rank * count, (rank + 1) * count)
        for other in range(size):
            part, is_there = torch.zeros(count, hidden), places_here(slots, other, placement.slots_per_rank)[own] >= 0
            for place, rows in enumerate(rows_of(other, step, size, hidden)[own].unbind(1)):
                part += rows.float() * is_there[:, place, None]
            total += part
        assert torch.equal(found, total), f"step {step}: sums"
    counted = torch.zeros(EXPERTS, dtype=torch.int64)
    for step in range(len(COUNTS)):
        _, ids, _, positions = tokens_of(rank, step, hidden)
        counted += torch.bincount(ids[positions >= 0].flatten(), minlength=EXPERTS)
    assert torch.equal(choices[rank].load, counted), "load"


def lose_a_rank(exchange: DirectExchange, rank: int, hidden: int, placement: ExpertPlacement) -> tuple[str, bool]:
    """What was raised, and whether the sums are NaN. A later step finds the exchange lost at once."""
    tokens, choice, is_nan = tokens_of(rank, 1, hidden), SlotChoice(placement, rank), False
    exchange._patience = PATIENCE
    arrived = exchange.dispatch(Tokens(*tokens, None), choice)
    if rank == 1:
        return "", False
    assert isinstance(arrived.x, torch.Tensor)
    rows = torch.ones(len(arrived.x), TOP_K, hidden)
    is_nan = bool(exchange.combine(rows, arrived).isnan().all())
    exchange._patience = 2**31 - 1
    later = exchange.combine(rows, exchange.dispatch(Tokens(*tokens, None), choice))
    try:
        exchange.check()
    except GroupLost as error:
        return str(error), is_nan and bool(later.isnan().all())
    return "", is_nan


def work(rank: int, size: int, hidden: int, addresses: list[int], said: Any, all_here: Any, everything: torch.Tensor) -> None:
    torch.set_num_threads(1)
    placement = balanced_placement([float(1 + expert % 3) for expert in range(EXPERTS)], size, -(-(EXPERTS + 1) // size))
    shape = ExchangeShape(hidden_size=hidden, num_slots=len(placement.experts), max_tokens=MOST, is_latency_bound=True)
    group: Any = Ranks(rank, size)
    others: Any = None
    exchange = DirectExchange(group, shape, addresses, torch.device("cpu"), others, None)
    problem, is_empty, lost, is_nan = None, False, "", False
    try:
        take_steps(exchange, rank, size, hidden, placement)
        all_here.wait(60)
        is_empty = bool((everything == 255).all())
        all_here.wait(60)
        lost, is_nan = lose_a_rank(exchange, rank, hidden, placement)
    except Exception:
        problem = traceback.format_exc()
        all_here.abort()
    said.put({"rank": rank, "problem": problem, "is_empty": is_empty, "lost": lost, "nan": is_nan})


def main() -> None:
    assert os.environ.get("TRITON_INTERPRET") == "1", "set TRITON_INTERPRET=1"
    parser = argparse.ArgumentParser()
    parser.add_argument("ranks", type=int)
    parser.add_argument("hidden", type=int)
    arguments = parser.parse_args()
    ranks = arguments.ranks
    torch.set_num_threads(1)
    shape = ExchangeShape(hidden_size=arguments.hidden, num_slots=EXPERTS, max_tokens=MOST, is_latency_bound=True)
    size = -(-Inbox(ranks, shape).num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
    shared = mmap.mmap(-1, size * ranks)  # at the same address in all processes, which are forks
    everything = torch.frombuffer(shared, dtype=torch.uint8)
    everything.fill_(255)
    addresses = [everything.data_ptr() + rank * size for rank in range(ranks)]
    triton_direct.LOOKS = LOOKS
    fork = multiprocessing.get_context("fork")
    said = fork.SimpleQueue()
    all_here = fork.Barrier(ranks)
    processes = [
        fork.Process(target=work, args=(rank, ranks, arguments.hidden, addresses, said, all_here, everything)) for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    for _ in processes:
        print(json.dumps(said.get()), flush=True)
    for process in processes:
        process.join()


if __name__ == "__main__":
    main()

"""Few tokens between GPUs of one host: a kernel that stores them straight into the memory of the ranks that need them, and one that brings
the sums back the same way. What `gather` does in two kernels and two collectives, with the latency of two stores over NVLink.

For decode steps of up to MOST_TOKENS tokens a rank; larger ones, where bandwidth counts, and prompts go as `gather` sends them. So does
everything where the ranks cannot reach each other's memory and `direct` was chosen for them: they try it when the exchange is opened, and
all say why not. Where the file names `direct`, they do not start.

Calls on several streams take effect in the order in which the host makes them. Replays of graphs do not pass here: who replays on another
stream than before has it wait for that one.
"""

from __future__ import annotations

import ctypes
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch

from core.errors import ConfigError, GroupLost
from core.log import get_logger
from engine.model.quantized import FP8_BLOCK
from engine.ops.expert_exchange import Arrived, Beside, ExchangeShape, ExpertExchange, Tokens, nothing
from engine.ops.expert_exchange.gather import GatherExchange, PaddedGatherExchange
from engine.ops.expert_exchange.triton_direct import TICK_BITS, TOLD, combine, dispatch
from engine.ops.registry import BoundOps
from engine.parallel.expert_placement import SlotChoice, even_placement
from engine.parallel.group import Group
from engine.parallel.peer_memory import PeerMemory

log = get_logger("exchange")

MOST_RANKS = 8
MOST_TOKENS = 256
"""Of a rank. Beyond, kernels that wait would keep others' from running for longer than NCCL takes."""
MOST_EXPERTS = 16
"""Of a token."""


def ticks_of(seconds: float) -> int:
    """So many ticks of the GPU's clock at least: it may be about to tick when the wait begins."""
    return math.ceil(seconds * 1e9 / 2**TICK_BITS.value) + 1


class Inbox:
    """Where the parts of an inbox begin, in bytes; triton_direct.py says what they are."""

    def __init__(self, ranks: int, shape: ExchangeShape) -> None:
        self.tokens = min(shape.max_tokens, MOST_TOKENS)
        rows = ranks * self.tokens
        self.labels_at = rows * shape.hidden_size * 4
        self.sums_at = self.labels_at + rows * MOST_EXPERTS * 8
        self.num_bytes = self.sums_at + rows * shape.hidden_size * 4


class InOrder:
    """Has calls follow each other on a device, whatever streams they are made on: two exchanges at a time would take each other's words."""

    def __init__(self, device: torch.device) -> None:
        self._last = torch.cuda.current_stream(device) if device.type == "cuda" else None

    def join(self) -> None:
        """Before a call. Under capture nothing runs."""
        if self._last is None or torch.cuda.is_current_stream_capturing():
            return
        now = torch.cuda.current_stream()
        if now != self._last:
            now.wait_stream(self._last)
            self._last = now


class DirectExchange:
    """A dispatch is followed by its combine, and all ranks bring the same number of tokens, as decode graphs do."""

    rows = 0

    def __init__(
        self,
        group: Group,
        shape: ExchangeShape,
        addresses: Sequence[int],
        device: torch.device,
        others: ExpertExchange,
        memory: PeerMemory | None,
    ) -> None:
        """addresses: of the ranks' inboxes, as this one sees them; `others`: for larger steps; `memory`: what is to be closed."""
        self._rank, self._slots_per_rank, self._num_slots = group.rank, shape.num_slots // group.size, shape.num_slots
        self._seat, self._others, self._memory = group.seat, others, memory
        self._inbox, self._order = Inbox(group.size, shape), InOrder(device)
        self._inboxes = torch.tensor(addresses, dtype=torch.int64, device=device)
        self._lost = [torch.zeros(1, dtype=torch.int32, device=device) for _ in range(2)]
        """What dispatches say, and what combines say; each reads the other's."""
        self._told = torch.zeros(TOLD, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._patience = ticks_of(group.limits.step_s)
        group.when_lost(self.give_up)

    def dispatch(self, tokens: Tokens, choice: SlotChoice) -> Arrived:
        x, ids = tokens.x, tokens.ids
        if len(x) > self._inbox.tokens:
            arrived = self._others.dispatch(tokens, choice)
            return dataclasses.replace(arrived, way_back=arrived)
        self._order.join()
        assert ids.shape[1] <= MOST_EXPERTS, f"{ids.shape[1]} experts a token; there is room for {MOST_EXPERTS}"
        dispatched, combined = self._lost
        sent = x if tokens.quantized is None or x.shape[1] % FP8_BLOCK else tokens.quantized
        rows = dispatch(
            sent, ids, tokens.weights, tokens.positions, (choice.table, choice.turns, choice.load), self._inboxes, self._inbox.labels_at,
            (combined, dispatched, self._told), self._rank, self._slots_per_rank, self._patience,
        )  # fmt: skip
        return Arrived(*rows, None, None, self._num_slots)

    def combine(self, rows: torch.Tensor, arrived: Arrived, beside: Beside = nothing) -> torch.Tensor:
        if arrived.way_back is not None:
            return self._others.combine(rows, arrived.way_back, beside)
        assert arrived.ids is not None
        self._order.join()
        dispatched, combined = self._lost
        flags = (dispatched, combined, self._told)
        return combine(rows, arrived.ids, self._inboxes, self._inbox.sums_at, flags, self._rank, self._patience)

    def give_up(self) -> None:
        """The group is lost: what waits on the GPU ends. From any thread."""
        self._told.fill_(1)

    def check(self) -> None:
        if self._told[0]:
            raise GroupLost(f"{self._seat.member}: a rank of its group did not send its tokens or sums in time")

    def close(self) -> None:
        self._others.close()
        if self._memory is not None:
            self._memory.close()


def problem_of(exchange: DirectExchange, rank: int, ranks: int, shape: ExchangeShape, device: torch.device) -> str:
    """What goes wrong with a token of each rank, sent to an expert on each; "" if nothing does. Collective."""
    value = torch.arange(shape.hidden_size, device=device).remainder(64).to(torch.bfloat16)
    ids, zeros = torch.arange(ranks, device=device)[None], torch.zeros(1, dtype=torch.int64, device=device)
    choice = SlotChoice(even_placement(ranks, ranks), rank, device)
    arrived = exchange.dispatch(Tokens((value + rank)[None], ids, torch.ones(1, ranks, device=device), zeros, None), choice)
    assert isinstance(arrived.x, torch.Tensor), "a decode step's tokens are not quantised"
    sums = exchange.combine(arrived.x.unsqueeze(1).repeat(1, ranks, 1), arrived)
    try:
        exchange.check()
    except GroupLost:
        return "what was stored did not arrive"
    expected = torch.stack([value + other for other in range(ranks)])
    is_right = torch.equal(arrived.x, expected) and torch.equal(sums, ranks * expected[rank : rank + 1].float())
    return "" if is_right else "what arrived is not what was stored"


def run(group: Group, shape: ExchangeShape, ops: BoundOps) -> ExpertExchange:
    """As the reference. Raises ConfigError, on all ranks alike, if engine.ops names `direct` and they cannot reach each other's memory."""
    if not shape.is_latency_bound:
        return PaddedGatherExchange(group, shape, ops)
    device = torch.device("cuda", torch.cuda.current_device())
    torch.cuda.synchronize(device)  # makes the primary context current
    return direct_or(GatherExchange(group, shape, ops), group, shape, device, ctypes.CDLL("libcuda.so.1"), "expert_exchange" in ops.named)


def direct_or(
    others: ExpertExchange, group: Group, shape: ExchangeShape, device: torch.device, driver: Any, is_named: bool
) -> ExpertExchange:
    """`others` where the ranks cannot reach each other's memory, unless `direct` was asked for by name: then as `run`."""
    try:
        return _opened(others, group, shape, device, driver)
    except ConfigError as error:
        if is_named:
            raise ConfigError(
                f"engine.ops.expert_exchange: direct cannot serve {group.seat.name}: {error}; choose gather, or name none"
            ) from error
        log.warning("exchange.gathers", member=group.seat.member, instead_of="direct", reason=error)
        return others


def _opened(others: ExpertExchange, group: Group, shape: ExchangeShape, device: torch.device, driver: Any) -> DirectExchange:
    """Raises ConfigError on all ranks alike, saying what is in the way."""
    if group.size > MOST_RANKS:
        raise ConfigError(f"{group.size} ranks; it is for up to {MOST_RANKS} on one host")
    memory = PeerMemory(group, Inbox(group.size, shape).num_bytes, driver)
    exchange = DirectExchange(group, shape, memory.addresses, device, others, memory)
    found = group.gather_bytes("direct", problem_of(exchange, group.rank, group.size, shape, device).encode())
    reasons = [f"{group.seat.member_of(rank)}: {one.decode()}" for rank, one in enumerate(found) if one]
    if reasons:
        memory.close()
        raise ConfigError("; ".join(reasons))
    log.info("exchange.direct", member=group.seat.member, mib=round(Inbox(group.size, shape).num_bytes / 2**20, 1))
    return exchange

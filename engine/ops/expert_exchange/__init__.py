"""How the ranks of a group bring tokens to their experts and the experts' results back.

The op opens an exchange; every MoE layer of the rank then uses it, all ranks in the same order:

    exchange = ops.expert_exchange(group, shape, ops)
    arrived = exchange.dispatch(tokens, choice)                              # my tokens out, everybody's tokens for my experts in
    rows = ops.moe_experts(arrived.x, arrived.ids, arrived.weights, experts, limit, arrived.sum_dtype, arrived.among)
    routed = exchange.combine(rows, arrived, beside)                         # [T, d], as one rank with all experts has it

Routing is decided at home, for hash layers from the home's token ids, so that token ids never travel. A rank without tokens calls
both with T = 0: its experts are needed by its peers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from engine.model.quantized import QuantizedRows
from engine.ops import requires
from engine.ops.moe_experts import Rooms
from engine.ops.registry import BoundOps, Impl, Op
from engine.parallel.expert_placement import SlotChoice
from engine.parallel.group import Group

Beside = Callable[[], object]


def nothing() -> None:
    """To be done beside."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExchangeShape:
    """What an exchange must be able to carry."""

    hidden_size: int
    num_slots: int
    """Of all ranks together; slot s is on rank s // (num_slots / ranks)."""
    max_tokens: int
    """Most tokens of one rank in a step."""
    is_latency_bound: bool
    """Decode: few tokens, replayed steps. Prefill: many tokens, where bandwidth counts."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """Of this rank, on their way to their experts."""

    x: torch.Tensor
    """[T, d]."""
    ids: torch.Tensor
    """int64 [T, k], the experts."""
    weights: torch.Tensor
    """fp32 [T, k]."""
    positions: torch.Tensor
    """int64 [T], -1 for rows that only fill up and whose results nobody reads."""
    quantized: QuantizedRows | None
    """x in FP8, if it is at hand, which may be sent in its place."""


@dataclass(frozen=True, slots=True)
class Arrived:
    """Rows for the experts of this rank, as `moe_experts` takes them."""

    x: torch.Tensor | QuantizedRows | Rooms
    """[R, d], in the sender's dtype, or quantised from it; or in rooms, which say whose each row is."""
    ids: torch.Tensor | None
    """int64 [R, j]: places of experts on this rank, from 0; -1 is none. None of rows in rooms."""
    weights: torch.Tensor | None
    """fp32 [R, j]. None of rows in rooms."""
    way_back: Any
    """The backend's own."""
    sum_dtype: torch.dtype | None = torch.float32
    """In which `combine` takes their sums; None: as they are, [R, j, d]."""
    among: int | None = None
    """Experts that `ids` were chosen from, of all ranks; None: only what is for this rank has come."""


class ExpertExchange(Protocol):
    rows: int
    """Set before a step: how many rows the ranks bring at most, where they have agreed on it; 0 where they have not."""

    def dispatch(self, tokens: Tokens, choice: SlotChoice) -> Arrived:
        """choice: which copy of an expert to use, and where tokens are counted."""
        ...

    def combine(self, rows: torch.Tensor, arrived: Arrived, beside: Beside = nothing) -> torch.Tensor:
        """rows: what `moe_experts` made of `arrived` and its sum_dtype, or the rooms' `out`. beside: what can be done while sums travel,
        for a backend that leaves the GPU free then: called once or not at all. Returns [T, d]: for each token the sum over its experts,
        fp32, or bf16 from a backend that rounds it to that."""
        ...

    def check(self) -> None:
        """Between a step's end on the device and the reading of its results: raises GroupLost if a rank did not answer in time, and the
        device could only go on without it."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class _WayBack:
    sent: list[int]
    received: list[int]
    row_of_place: torch.Tensor
    """int64 [T, k]: where in the rows that were sent is the row of this token for its i-th expert, experts in ascending order."""
    dtype: torch.dtype


class RowExchange:
    """The definition: one row for each (token, expert), out and back, over the process group of x's device (gloo, NCCL).

    Rows of a token are added up at home in float64, in the order of expert ids, as the reference of `moe_experts` does with all experts
    on one rank. Hence the result is the same to the bit, whatever the group's size and wherever the copies are.
    """

    rows = 0

    def __init__(self, group: Group, shape: ExchangeShape) -> None:
        assert shape.num_slots % group.size == 0, f"{shape.num_slots} slots on {group.size} ranks"
        self._group, self._slots_per_rank = group, shape.num_slots // group.size

    def dispatch(self, tokens: Tokens, choice: SlotChoice) -> Arrived:
        x, ids, weights = tokens.x, tokens.ids, tokens.weights
        (num_tokens, top_k), slots = ids.shape, choice.counted(ids, tokens.positions)
        by_slot = torch.sort(slots.flatten(), stable=True).indices
        token = by_slot // top_k
        slot = slots.flatten()[by_slot]
        sent = torch.bincount(slot // self._slots_per_rank, minlength=self._group.size).cpu()
        received = self._group.exchange_counts(sent).tolist()
        places = (slot % self._slots_per_rank).to(torch.int32)
        labels = torch.stack((places, weights.flatten()[by_slot].view(torch.int32)), dim=1)
        message = torch.cat((x[token].contiguous().view(torch.uint8), labels.view(torch.uint8)), dim=1)
        arrived = self._group.all_to_all(message, sent.tolist(), received)
        labels = arrived[:, -8:].contiguous().view(torch.int32)
        rows = arrived[:, :-8].contiguous().view(x.dtype)
        place = torch.empty_like(by_slot)
        place[by_slot] = torch.arange(len(by_slot), device=x.device)
        order = torch.sort(ids, dim=1, stable=True).indices
        way_back = _WayBack(sent.tolist(), received, place.view(num_tokens, top_k).gather(1, order), x.dtype)
        return Arrived(rows, labels[:, :1].long(), labels[:, 1:].contiguous().view(torch.float32), way_back)

    def combine(self, rows: torch.Tensor, arrived: Arrived, beside: Beside = nothing) -> torch.Tensor:
        back: _WayBack = arrived.way_back
        home = self._group.all_to_all(rows.to(back.dtype), back.received, back.sent)  # exact: an expert's row was rounded to that dtype
        out = torch.zeros(len(back.row_of_place), rows.shape[1], dtype=torch.float64, device=rows.device)
        for place in back.row_of_place.unbind(1):
            out += home[place]
        return out.float()

    def check(self) -> None:
        """The process group has deadlines of its own."""

    def close(self) -> None:
        """The connections are the group's."""


def expert_exchange(group: Group, shape: ExchangeShape, ops: BoundOps) -> ExpertExchange:
    """Open an exchange: collective, all ranks with the same shape. `ops`: what it may use. Raises GroupLost."""
    return RowExchange(group, shape)


OP = Op(
    "expert_exchange",
    expert_exchange,
    backends={
        "direct": Impl("engine.ops.expert_exchange.direct", requires.triton),
        "gather": Impl("engine.ops.expert_exchange.gather", requires.cuda),
        "deepep": Impl("engine.ops.expert_exchange.deepep", requires.deep_ep),
    },
)

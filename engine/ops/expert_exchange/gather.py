"""All tokens to all ranks, and sums back: collectives whose sizes depend on the step alone, not on the routing.

With few ranks nearly every token has an expert on each of them (six of 256 experts, on two ranks: 98 %), so little is sent in vain, and
nobody waits for the host to learn sizes. With many ranks DeepEP sends less.

decode    every rank of the group has as many rows (fillers included): two collectives a layer, which a CUDA graph can hold
prefill   ranks have different numbers of rows: each fills up to what the step's plan allows, of which only bandwidth is lost
"""

from __future__ import annotations

import torch

from engine.ops.exchange_unpack import places_here
from engine.ops.expert_exchange import Arrived, ExchangeShape, ExpertExchange
from engine.ops.registry import BoundOps
from engine.parallel.expert_placement import SlotChoice
from engine.parallel.group import Group


class GatherExchange:
    rows = 0

    def __init__(self, group: Group, shape: ExchangeShape, ops: BoundOps) -> None:
        self._group, self._ops, self._slots_per_rank = group, ops, shape.num_slots // group.size

    def dispatch(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, positions: torch.Tensor, choice: SlotChoice) -> Arrived:
        message = self._ops.exchange_pack(x, ids, weights, positions, choice.table, choice.turns, choice.load)
        every = message.new_empty(self._group.size * len(x), message.shape[1])
        with self._group.working("the gathering of tokens"):
            self._group.backend(x.device)._allgather_base(every, message).wait()
        every_x, places, every_weight = self._ops.exchange_unpack(every, ids.shape[1], self._group.rank, self._slots_per_rank, x.dtype)
        return Arrived(every_x, places, every_weight, None)

    def combine(self, rows: torch.Tensor, arrived: Arrived) -> torch.Tensor:
        out = rows.new_empty(len(rows) // self._group.size, rows.shape[1])
        with self._group.working("the summing up of experts"):
            self._group.backend(rows.device)._reduce_scatter_base(out, rows).wait()
        return out

    def check(self) -> None:
        """The process group has deadlines of its own."""

    def close(self) -> None:
        """The connections are the group's."""


class PaddedGatherExchange:
    """`rows` is what the ranks fill up to. Where it is not known, they agree on it in each layer, over the host."""

    def __init__(self, group: Group, shape: ExchangeShape) -> None:
        self._group, self._slots_per_rank = group, shape.num_slots // group.size
        self.rows = 0

    def dispatch(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, positions: torch.Tensor, choice: SlotChoice) -> Arrived:
        slots = choice.counted(ids, positions)
        rows = self.rows or self._most(len(x))
        assert len(x) <= rows, f"{len(x)} rows in a step of {rows}"
        labels = torch.stack((slots.to(torch.int32), weights.view(torch.int32)))
        if len(x) < rows:
            x = torch.nn.functional.pad(x, (0, 0, 0, rows - len(x)))
            labels = torch.nn.functional.pad(labels, (0, 0, 0, rows - labels.shape[1]), value=-1)
        every_x = x.new_empty(self._group.size * rows, x.shape[1])
        every_label = labels.new_empty(self._group.size * 2, *labels.shape[1:])
        with self._group.working("the gathering of tokens"):
            backend = self._group.backend(x.device)
            backend._allgather_base(every_label, labels.contiguous()).wait()
            backend._allgather_base(every_x, x.contiguous()).wait()
        every_slot, every_weight = every_label.unflatten(0, (-1, 2)).transpose(0, 1).flatten(1, 2)
        places = places_here(every_slot, self._group.rank, self._slots_per_rank)
        return Arrived(every_x, places, every_weight.view(torch.float32), len(slots))

    def combine(self, rows: torch.Tensor, arrived: Arrived) -> torch.Tensor:
        out = rows.new_empty(len(rows) // self._group.size, rows.shape[1])
        with self._group.working("the summing up of experts"):
            self._group.backend(rows.device)._reduce_scatter_base(out, rows).wait()
        return out[: arrived.way_back]

    def _most(self, mine: int) -> int:
        most = torch.tensor(mine)
        with self._group.working("the agreement on rows"):
            self._group.backend(most.device).allreduce([most], torch.distributed.ReduceOp.MAX).wait()
        return int(most)

    def check(self) -> None:
        """The process group has deadlines of its own."""

    def close(self) -> None:
        """The connections are the group's."""


def run(group: Group, shape: ExchangeShape, ops: BoundOps) -> ExpertExchange:
    """As the reference."""
    return GatherExchange(group, shape, ops) if shape.is_latency_bound else PaddedGatherExchange(group, shape)

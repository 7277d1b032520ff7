"""All tokens to all ranks, and sums back: collectives whose sizes depend on the step alone, not on the routing.

With few ranks nearly every token has an expert on each of them (six of 256 experts, on two ranks: 98 %), so little is sent in vain, and
nobody waits for the host to learn sizes. With many ranks DeepEP sends less.

decode    every rank of the group has as many rows (fillers included): two collectives a layer, which a CUDA graph can hold
prefill   ranks have different numbers of rows: each fills up to what the step's plan allows, of which only bandwidth is lost. Tokens go
          in FP8, as the experts take them anyway, and a rank's part of a token's sum comes back in bf16, in which its experts' outputs
          are, to be added up at home in fp32 in the order of ranks: half the bytes both ways. (In float32 mode nothing is rounded.)
"""

from __future__ import annotations

import torch

from engine.model.quantized import FP8_BLOCK, QuantizedRows
from engine.ops.expert_exchange import Arrived, Beside, ExchangeShape, ExpertExchange, Tokens, nothing
from engine.ops.registry import BoundOps
from engine.parallel.expert_placement import SlotChoice
from engine.parallel.group import Group


class GatherExchange:
    rows = 0

    def __init__(self, group: Group, shape: ExchangeShape, ops: BoundOps) -> None:
        self._group, self._ops, self._num_slots = group, ops, shape.num_slots
        self._slots_per_rank = shape.num_slots // group.size

    def dispatch(self, tokens: Tokens, choice: SlotChoice) -> Arrived:
        x, ids, weights, positions = tokens.x, tokens.ids, tokens.weights, tokens.positions
        message = self._ops.exchange_pack(x, ids, weights, positions, choice.table, choice.turns, choice.load)
        every = message.new_empty(self._group.size * len(x), message.shape[1])
        with self._group.working("the gathering of tokens"):
            self._group.backend(x.device)._allgather_base(every, message).wait()
        every_x, places, every_weight = self._ops.exchange_unpack(every, ids.shape[1], self._group.rank, self._slots_per_rank, x.dtype)
        return Arrived(every_x, places, every_weight, None, among=self._num_slots)

    def combine(self, rows: torch.Tensor, arrived: Arrived, beside: Beside = nothing) -> torch.Tensor:
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

    def __init__(self, group: Group, shape: ExchangeShape, ops: BoundOps) -> None:
        self._group, self._ops, self._num_slots = group, ops, shape.num_slots
        self._slots_per_rank = shape.num_slots // group.size
        self.rows = 0

    def dispatch(self, tokens: Tokens, choice: SlotChoice) -> Arrived:
        x, ids, weights, positions = tokens.x, tokens.ids, tokens.weights, tokens.positions
        rows = self.rows or self._most(len(x))
        assert len(x) <= rows, f"{len(x)} rows in a step of {rows}"
        to_pack = x, ids, weights, positions, choice.table, choice.turns, choice.load
        labels = ids.shape[1], self._group.rank, self._slots_per_rank
        if x.dtype != torch.bfloat16 or x.shape[1] % FP8_BLOCK:
            message = self._ops.exchange_pack(*to_pack)
            every = self._gathered(torch.nn.functional.pad(message, (0, 0, 0, rows - len(x)), value=-1))
            every_x, places, every_weight = self._ops.exchange_unpack(every, *labels, x.dtype)
            return Arrived(every_x, places, every_weight, len(x), among=self._num_slots)
        every = self._gathered(self._ops.exchange_pack_fp8(*to_pack, rows))
        codes, scale, places, every_weight = self._ops.exchange_unpack_fp8(every, x.shape[1], *labels)
        return Arrived(QuantizedRows(codes, scale, x.dtype), places, every_weight, len(x), torch.bfloat16, self._num_slots)

    def _gathered(self, message: torch.Tensor) -> torch.Tensor:
        every = message.new_empty(self._group.size * len(message), message.shape[1])
        with self._group.working("the gathering of tokens"):
            self._group.backend(message.device)._allgather_base(every, message).wait()
        return every

    def combine(self, rows: torch.Tensor, arrived: Arrived, beside: Beside = nothing) -> torch.Tensor:
        parts = rows.unflatten(0, (self._group.size, -1))
        if arrived.sum_dtype == torch.bfloat16:
            others = torch.empty_like(parts)
            arrive = self._group.swap(parts.unbind(), others.unbind())
            beside()
            arrive()
            out: torch.Tensor = self._ops.exchange_sum(parts[self._group.rank], others, self._group.rank)
        else:
            out = torch.empty_like(parts[0])
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
    return GatherExchange(group, shape, ops) if shape.is_latency_bound else PaddedGatherExchange(group, shape, ops)

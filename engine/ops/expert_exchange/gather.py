"""All tokens to all ranks, and sums back: two collectives a layer, whose sizes depend on the step's bucket alone.

So a decode step with them can be a CUDA graph. Every rank of the group has the same number of rows (fillers included); for prefill,
where the ranks' numbers differ and rows are many, rows are exchanged one by one instead, as the reference does.
"""

from __future__ import annotations

import torch

from engine.ops.expert_exchange import Arrived, ExchangeShape, ExpertExchange, RowExchange
from engine.parallel.group import Group


class GatherExchange:
    def __init__(self, group: Group, shape: ExchangeShape) -> None:
        self._group, self._slots_per_rank = group, shape.num_slots // group.size

    def dispatch(self, x: torch.Tensor, ids: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor) -> Arrived:
        top_k = ids.shape[1]
        message = torch.cat((x.view(torch.uint8), slots.int().view(torch.uint8), weights.view(torch.uint8)), dim=1)
        every = message.new_empty(self._group.size * len(x), message.shape[1])
        with self._group.working("the gathering of tokens"):
            self._group.backend(x.device)._allgather_base(every, message).wait()
        width = x.shape[1] * x.element_size()
        labels = every[:, width:].contiguous()
        places = labels[:, : 4 * top_k].contiguous().view(torch.int32).long() - self._group.rank * self._slots_per_rank
        places = torch.where((places >= 0) & (places < self._slots_per_rank), places, -1)
        arrived_weights = labels[:, 4 * top_k :].contiguous().view(torch.float32)
        return Arrived(every[:, :width].contiguous().view(x.dtype), places, arrived_weights, None)

    def combine(self, rows: torch.Tensor, arrived: Arrived) -> torch.Tensor:
        out = rows.new_empty(len(rows) // self._group.size, rows.shape[1])
        with self._group.working("the summing up of experts"):
            self._group.backend(rows.device)._reduce_scatter_base(out, rows).wait()
        return out

    def close(self) -> None:
        """The connections are the group's."""


def run(group: Group, shape: ExchangeShape) -> ExpertExchange:
    return GatherExchange(group, shape) if shape.is_latency_bound else RowExchange(group, shape)

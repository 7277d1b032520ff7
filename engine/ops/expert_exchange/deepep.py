"""DeepEP 1.2.1: normal mode for prefill, low-latency mode for decode (inside CUDA graphs: no size depends on the routing).

normal        a token goes once to each rank that has experts of it, in bf16; that rank's sum for it comes back in bf16
low latency   a token goes once for each expert, in FP8 with scales that are powers of two, so that it is quantised only once: what
              `moe_experts` makes of it again is the same; results come back in bf16, and are weighted and added up at home

Both round a token's sum to bf16. Low latency applies the weight after w2 in place of before, so the FP8 rounding of the hidden values
differs: about 4 % of a row's norm, as with any other order of weight and rounding.
"""

from __future__ import annotations

import os
from typing import Any

import deep_ep
import torch

from engine.model.quantized import FP8_BLOCK
from engine.ops.expert_exchange import Arrived, ExchangeShape, ExpertExchange
from engine.parallel.group import Group


class _Ranks:
    """The group, as the object with which DeepEP exchanges its handles."""

    def __init__(self, group: Group) -> None:
        self._group, self._calls = group, 0

    def Get_rank(self) -> int:
        return self._group.rank

    def Get_size(self) -> int:
        return self._group.size

    def allgather(self, mine: int | bytes | bytearray | None) -> list[int | bytearray | None]:
        """In the order of ranks. A first byte says what it is: nothing, a number or bytes."""
        self._calls += 1
        if mine is None:
            message = b"n"
        elif isinstance(mine, int):
            message = b"i%d" % mine
        else:
            message = b"b" + bytes(mine)
        found = self._group.gather_bytes(f"deepep/{self._calls}", message)
        return [None if one[:1] == b"n" else int(one[1:]) if one[:1] == b"i" else bytearray(one[1:]) for one in found]


class NormalExchange:
    rows = 0

    def __init__(self, group: Group, shape: ExchangeShape) -> None:
        self._num_slots = shape.num_slots
        row_bytes = shape.hidden_size * torch.bfloat16.itemsize
        configs = (deep_ep.Buffer.get_dispatch_config(group.size), deep_ep.Buffer.get_combine_config(group.size))
        with group.working("the opening of DeepEP"):
            self._buffer = deep_ep.Buffer(
                None,
                max(config.get_nvl_buffer_size_hint(row_bytes, group.size) for config in configs),
                max(config.get_rdma_buffer_size_hint(row_bytes, group.size) for config in configs),
                explicitly_destroy=True,
                comm=_Ranks(group),
            )

    def dispatch(self, x: torch.Tensor, ids: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor) -> Arrived:
        per_rank, per_rdma_rank, per_slot, is_in_rank, _ = self._buffer.get_dispatch_layout(slots, self._num_slots)
        rows, places, row_weights, _, handle, _ = self._buffer.dispatch(
            x,
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_rdma_rank,
            is_token_in_rank=is_in_rank,
            num_tokens_per_expert=per_slot,
            topk_idx=slots,
            topk_weights=weights,
        )
        return Arrived(rows, places, row_weights, handle)

    def combine(self, rows: torch.Tensor, arrived: Arrived) -> torch.Tensor:
        total: torch.Tensor = self._buffer.combine(rows.bfloat16(), arrived.way_back)[0]
        return total.float()

    def close(self) -> None:
        self._buffer.destroy()


class LowLatencyExchange:
    """What arrives lies in a buffer [experts, room, d], mostly empty; `dispatch` takes the rows together, into as many as there can be
    at most, and `combine` puts the results back to where theirs came from."""

    rows = 0

    def __init__(self, group: Group, shape: ExchangeShape) -> None:
        self._shape, self._size = shape, group.size
        self._experts = shape.num_slots // group.size
        self._room = shape.max_tokens * group.size
        needed = 2 * (shape.max_tokens + 1)
        os.environ["NVSHMEM_QP_DEPTH"] = str(max(1024, 1 << (needed - 1).bit_length()))  # DeepEP asks for that many, through this
        hint = deep_ep.Buffer.get_low_latency_rdma_size_hint(shape.max_tokens, shape.hidden_size, group.size, shape.num_slots)
        with group.working("the opening of DeepEP"):
            self._buffer = deep_ep.Buffer(
                None,
                0,
                hint,
                low_latency_mode=True,
                num_qps_per_rank=self._experts,
                allow_mnnvl=True,
                explicitly_destroy=True,
                comm=_Ranks(group),
            )

    def dispatch(self, x: torch.Tensor, ids: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor) -> Arrived:
        """weights stay at home: `Arrived.weights` are ones, and `combine` applies them."""
        assert len(x) <= self._shape.max_tokens, f"{len(x)} tokens; the buffers are for {self._shape.max_tokens}"
        (codes, scales), counts, handle, _, _ = self._buffer.low_latency_dispatch(
            x, slots, self._shape.max_tokens, self._shape.num_slots, use_fp8=True, round_scale=True
        )
        most = self._room * min(slots.shape[1], self._experts)
        ends = counts.long().cumsum(0)
        number = torch.arange(most, device=x.device)
        # Past the last row, the last row again: it is read and written twice, with the same result.
        source = torch.minimum(number, ends[-1] - 1).clamp(min=0)
        expert = torch.searchsorted(ends, source, right=True).clamp(max=self._experts - 1)
        place = source - (ends - counts)[expert]
        values = codes[expert, place].to(x.dtype).unflatten(1, (-1, FP8_BLOCK)) * scales[expert, place].to(x.dtype)[..., None]
        ids_here = torch.where(number < ends[-1], expert, -1)[:, None]
        ones = torch.ones(most, 1, dtype=torch.float32, device=x.device)
        return Arrived(values.flatten(1), ids_here, ones, (handle, slots, weights, source, expert, place))

    def combine(self, rows: torch.Tensor, arrived: Arrived) -> torch.Tensor:
        handle, slots, weights, source, expert, place = arrived.way_back
        buffer: Any = self._buffer.get_next_low_latency_combine_buffer(handle)
        buffer[expert, place] = rows.bfloat16()[source]
        total: torch.Tensor = self._buffer.low_latency_combine(buffer, slots, weights, handle, zero_copy=True)[0]
        return total.float()

    def close(self) -> None:
        self._buffer.destroy()


def run(group: Group, shape: ExchangeShape) -> ExpertExchange:
    """As the reference."""
    return LowLatencyExchange(group, shape) if shape.is_latency_bound else NormalExchange(group, shape)

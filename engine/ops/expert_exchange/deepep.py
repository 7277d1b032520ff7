"""DeepEP 1.2.1: normal mode for prefill, low-latency mode for decode (inside CUDA graphs: no size depends on the routing).

normal        a token goes once to each rank that has experts of it, in FP8, as experts take it; that rank's sum for it comes back in bf16
low latency   a token goes once for each expert, in FP8 with scales that are powers of two, as experts take it; these read it where it
              arrives and leave their results, bf16, where DeepEP sends them from; weighted and added up at home

Both round a token's sum to bf16. Low latency applies the weight after w2 in place of before, so the FP8 rounding of the hidden values
differs: about 4 % of a row's norm, as with any other order of weight and rounding.
"""

from __future__ import annotations

import os
from typing import Any

import deep_ep
import torch

from core.errors import ConfigError, GroupLost
from core.log import get_logger
from engine.model.quantized import FP8_BLOCK, QuantizedRows
from engine.ops.expert_exchange import Arrived, Beside, ExchangeShape, ExpertExchange, Tokens, nothing
from engine.ops.moe_experts import Rooms
from engine.ops.registry import BoundOps
from engine.parallel.expert_placement import SlotChoice
from engine.parallel.group import Group

log = get_logger("exchange")

HIDDEN_SIZES = (2048, 2560, 3072, 4096, 5120, 6144, 7168, 8192)
"""For which low-latency kernels are compiled."""
NORMAL_GROUPS = (2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 144, 160)
"""For which normal kernels are compiled."""
NVLINK_PEERS = 8
"""Larger groups are made of so many ranks each."""
TOKENS_MULTIPLE = 4
"""Room for tokens is a multiple, so that rows of scales start where bulk copies can."""


class _Ranks:
    """The group, as the object with which DeepEP exchanges its handles."""

    def __init__(self, group: Group) -> None:
        self._group = group

    def Get_rank(self) -> int:
        return self._group.rank

    def Get_size(self) -> int:
        return self._group.size

    def allgather(self, mine: int | bytes | bytearray | None) -> list[int | bytearray | None]:
        """In the order of ranks. A first byte says what it is: nothing, a number or bytes."""
        if mine is None:
            message = b"n"
        elif isinstance(mine, int):
            message = b"i%d" % mine
        else:
            message = b"b" + bytes(mine)
        found = self._group.gather_bytes("deepep", message)
        return [None if one[:1] == b"n" else int(one[1:]) if one[:1] == b"i" else bytearray(one[1:]) for one in found]


class _Buffer:
    """Owner of a DeepEP buffer."""

    rows = 0

    def __init__(self, group: Group, *sizes: int, **options: Any) -> None:
        self._group = group
        with group.working("the opening of DeepEP"):
            self._buffer = deep_ep.Buffer(None, *sizes, explicitly_destroy=True, comm=_Ranks(group), **options)

    def check(self) -> None:
        """DeepEP's kernels trap when a rank does not answer, which torch raises."""

    def close(self) -> None:
        """DeepEP's own end waits for all ranks, for ever: it is only begun when all are here. Else the process's end frees what is held."""
        try:
            self._group.barrier()
        except GroupLost as error:
            log.info("deepep.left", member=self._group.seat.member, error=error)
            return
        self._buffer.destroy()


class NormalExchange(_Buffer):
    def __init__(self, group: Group, shape: ExchangeShape, ops: BoundOps) -> None:
        if group.size not in NORMAL_GROUPS:
            raise _misfit(f"groups of {', '.join(map(str, NORMAL_GROUPS))} ranks in normal mode", f"{group.seat.name} has {group.size}")
        if shape.hidden_size % FP8_BLOCK:
            raise _misfit(f"hidden sizes of whole groups of {FP8_BLOCK}", f"the model has {shape.hidden_size}")
        self._ops, self._num_slots = ops, shape.num_slots
        row_bytes = shape.hidden_size * torch.bfloat16.itemsize
        configs = (deep_ep.Buffer.get_dispatch_config(group.size), deep_ep.Buffer.get_combine_config(group.size))
        super().__init__(
            group,
            max(config.get_nvl_buffer_size_hint(row_bytes, group.size) for config in configs),
            max(config.get_rdma_buffer_size_hint(row_bytes, group.size) for config in configs),
        )

    def dispatch(self, tokens: Tokens, choice: SlotChoice) -> Arrived:
        x, ids, weights, positions = tokens.x, tokens.ids, tokens.weights, tokens.positions
        codes, scale, slots = self._ops.exchange_slots_fp8(x, ids, positions, choice.table, choice.turns, choice.load)
        per_rank, per_rdma_rank, per_slot, is_in_rank, _ = self._buffer.get_dispatch_layout(slots, self._num_slots)
        (rows, row_scales), places, row_weights, _, handle, _ = self._buffer.dispatch(
            (codes, scale),
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_rdma_rank,
            is_token_in_rank=is_in_rank,
            num_tokens_per_expert=per_slot,
            topk_idx=slots,
            topk_weights=weights,
        )
        return Arrived(QuantizedRows(rows, row_scales, x.dtype), places, row_weights, handle, torch.bfloat16, self._num_slots)

    def combine(self, rows: torch.Tensor, arrived: Arrived, beside: Beside = nothing) -> torch.Tensor:
        total: torch.Tensor = self._buffer.combine(rows, arrived.way_back)[0]
        return total


class LowLatencyExchange(_Buffer):
    """What arrives lies in rooms, one for each expert. Other ranks bring as many rows, or at most `rows`."""

    def __init__(self, group: Group, shape: ExchangeShape, ops: BoundOps) -> None:
        if shape.hidden_size not in HIDDEN_SIZES:
            raise _misfit(f"hidden sizes {', '.join(map(str, HIDDEN_SIZES))} in low-latency mode", f"the model has {shape.hidden_size}")
        if group.size >= NVLINK_PEERS and group.size % NVLINK_PEERS:
            raise _misfit(f"groups below {NVLINK_PEERS} ranks, or of a multiple of it", f"{group.seat.name} has {group.size}")
        self._ops = ops
        self._num_slots, self._experts = shape.num_slots, shape.num_slots // group.size
        self._max_tokens = -(-shape.max_tokens // TOKENS_MULTIPLE) * TOKENS_MULTIPLE
        self._size = group.size
        needed = 2 * (self._max_tokens + 1)
        os.environ["NVSHMEM_QP_DEPTH"] = str(max(1024, 1 << (needed - 1).bit_length()))  # DeepEP asks for that many, through this
        hint = deep_ep.Buffer.get_low_latency_rdma_size_hint(self._max_tokens, shape.hidden_size, group.size, shape.num_slots)
        super().__init__(group, 0, hint, low_latency_mode=True, num_qps_per_rank=self._experts, allow_mnnvl=True)

    def dispatch(self, tokens: Tokens, choice: SlotChoice) -> Arrived:
        """weights stay at home: `combine` applies them. Rows that only fill up go nowhere."""
        x, ids, weights, positions = tokens.x, tokens.ids, tokens.weights, tokens.positions
        assert len(x) <= self._max_tokens, f"{len(x)} tokens; the buffers are for {self._max_tokens}"
        slots = self._ops.exchange_slots(ids, positions, choice.table, choice.turns, choice.load)
        (codes, scales), counts, handle, _, _ = self._buffer.low_latency_dispatch(
            x, slots, self._max_tokens, self._num_slots, use_fp8=True, round_scale=True
        )
        rows, top_k = max(len(x), self.rows), slots.shape[1]
        most, usual = rows * self._size * min(top_k, self._experts), rows * top_k
        rooms = Rooms(codes, scales, counts, most, usual, self._buffer.get_next_low_latency_combine_buffer(handle))
        return Arrived(rooms, None, None, (handle, slots, weights), torch.bfloat16)

    def combine(self, rows: torch.Tensor, arrived: Arrived, beside: Beside = nothing) -> torch.Tensor:
        """rows: the `out` of the rooms."""
        assert isinstance(arrived.x, Rooms) and rows.data_ptr() == arrived.x.out.data_ptr(), "results lie elsewhere"
        handle, slots, weights = arrived.way_back
        # With zero_copy results are read from DeepEP's buffer. Its rows lie apart, and the first argument must be contiguous all the same:
        # it says shape and dtype, and nothing is read from it.
        experts, room, width = rows.shape
        shape = rows.as_strided((experts, room, width), (room * width, width, 1))
        total: torch.Tensor = self._buffer.low_latency_combine(shape, slots, weights, handle, zero_copy=True)[0]
        return total


def _misfit(known: str, found: str) -> ConfigError:
    return ConfigError(f"engine.ops.expert_exchange: deepep knows {known}; {found}: choose gather")


def run(group: Group, shape: ExchangeShape, ops: BoundOps) -> ExpertExchange:
    """As the reference."""
    return LowLatencyExchange(group, shape, ops) if shape.is_latency_bound else NormalExchange(group, shape, ops)

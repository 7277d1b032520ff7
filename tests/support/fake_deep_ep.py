"""A stand-in for DeepEP's `Buffer` (1.2.1) on the CPU, for ranks that are threads: the shapes of its documentation and the checks of its
C++ code (csrc/deep_ep.cpp, named where they are made), none of its speed.

fake = FakeDeepEP(size)
monkeypatch.setitem(sys.modules, "deep_ep", fake.module())
"""

from __future__ import annotations

import threading
import types
from typing import Any

import torch

FP8_MAX = 448.0


class _Config:
    def get_nvl_buffer_size_hint(self, row_bytes: int, size: int) -> int:
        return row_bytes * size

    def get_rdma_buffer_size_hint(self, row_bytes: int, size: int) -> int:
        return 0


class FakeDeepEP:
    """What the ranks share: a meeting point where each leaves something and takes everybody's."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._left: dict[int, Any] = {}
        self._barrier = threading.Barrier(size)

    def meet(self, rank: int, mine: Any) -> list[Any]:
        self._left[rank] = mine
        self._barrier.wait(20)
        found = [self._left[one] for one in range(self.size)]
        self._barrier.wait(20)
        return found

    def module(self) -> types.ModuleType:
        made = types.ModuleType("deep_ep")
        made.Buffer = type("Buffer", (_Buffer,), {"shared": self})  # type: ignore[attr-defined]
        return made


class _Buffer:
    shared: FakeDeepEP

    def __init__(
        self,
        group: None,
        num_nvl_bytes: int,
        num_rdma_bytes: int,
        low_latency_mode: bool = False,
        num_qps_per_rank: int = 24,
        allow_mnnvl: bool = False,
        explicitly_destroy: bool = False,
        comm: Any = None,
    ) -> None:
        assert group is None and explicitly_destroy
        assert num_rdma_bytes if low_latency_mode else num_nvl_bytes
        self.bytes = num_rdma_bytes
        self.rank, self.size = comm.Get_rank(), comm.Get_size()
        assert comm.allgather(self.rank) == list(range(self.size))
        assert comm.allgather(bytearray([self.rank])) == [bytearray([rank]) for rank in range(self.size)]
        root = bytearray(b"id") if self.rank == 0 else None
        assert comm.allgather(root) == [bytearray(b"id")] + [None] * (self.size - 1)
        self._next: torch.Tensor | None = None

    @staticmethod
    def get_dispatch_config(size: int) -> _Config:
        return _Config()

    get_combine_config = get_dispatch_config

    @staticmethod
    def get_low_latency_rdma_size_hint(max_tokens: int, hidden: int, size: int, num_experts: int) -> int:
        return 4 * num_experts * max_tokens * _row_bytes(hidden)

    def destroy(self) -> None:
        self.shared.meet(self.rank, None)
        self._next = None

    def get_dispatch_layout(self, topk_idx: torch.Tensor, num_experts: int) -> tuple[Any, ...]:
        assert topk_idx.dim() == 2 and topk_idx.is_contiguous() and topk_idx.dtype == torch.int64
        local = num_experts // self.size
        is_in_rank = ((topk_idx // local)[:, :, None] == torch.arange(self.size)).any(1)
        per_expert = torch.bincount(topk_idx[topk_idx >= 0], minlength=num_experts).int()
        return is_in_rank.sum(0).int(), None, per_expert, is_in_rank, None

    def dispatch(self, rows: torch.Tensor | tuple[torch.Tensor, torch.Tensor], **layout: Any) -> tuple[Any, ...]:
        x, scale = rows if isinstance(rows, tuple) else (rows, torch.ones(len(rows), rows.shape[1] // 128))
        assert x.dim() == 2 and x.is_contiguous() and x.dtype == (torch.float8_e4m3fn if isinstance(rows, tuple) else torch.bfloat16)
        assert scale.shape == (len(x), x.shape[1] // 128) and scale.is_contiguous() and scale.dtype == torch.float32
        assert layout["topk_idx"].is_contiguous() and layout["topk_idx"].dtype == torch.int64  # intranode_dispatch
        assert layout["topk_weights"].is_contiguous() and layout["topk_weights"].dtype == torch.float32
        assert layout["is_token_in_rank"].shape == (len(x), self.size) and layout["is_token_in_rank"].is_contiguous()
        local = len(layout["num_tokens_per_expert"]) // self.size
        sent = self.shared.meet(
            self.rank, (x.view(torch.uint8), scale, layout["topk_idx"], layout["topk_weights"], layout["is_token_in_rank"])
        )
        xs, scales, ids, weights, sources = [], [], [], [], []
        for rank, (sent_rows, row_scales, topk, topk_weights, is_in_rank) in enumerate(sent):
            chosen = is_in_rank[:, self.rank].nonzero()[:, 0]
            here = (topk[chosen] // local) == self.rank
            xs.append(sent_rows[chosen])
            scales.append(row_scales[chosen])
            ids.append(torch.where(here, topk[chosen] % local, -1))
            weights.append(torch.where(here, topk_weights[chosen], 0.0))
            sources.append((rank, chosen))
        counts = [int((torch.cat(ids) == expert).sum()) for expert in range(local)]
        got = torch.cat(xs).view(x.dtype)
        found = (got, torch.cat(scales)) if isinstance(rows, tuple) else got
        return found, torch.cat(ids), torch.cat(weights), counts, (sources, len(x)), None

    def combine(self, x: torch.Tensor, handle: Any) -> tuple[Any, ...]:
        assert x.dim() == 2 and x.is_contiguous() and x.dtype == torch.bfloat16  # intranode_combine
        sources, num_tokens = handle
        back = self.shared.meet(self.rank, [(rank, chosen, part) for (rank, chosen), part in zip(sources, _split(x, sources), strict=True)])
        total = torch.zeros(num_tokens, x.shape[1])
        for parts in back:
            for rank, chosen, rows in parts:
                if rank == self.rank:
                    total[chosen] += rows.float()
        return total.bfloat16(), None, None

    def low_latency_dispatch(
        self, x: torch.Tensor, topk_idx: torch.Tensor, max_tokens: int, num_experts: int, use_fp8: bool, round_scale: bool
    ) -> tuple[Any, ...]:
        assert use_fp8 and round_scale
        assert x.is_contiguous() and x.dtype == torch.bfloat16 and len(x) <= max_tokens  # low_latency_dispatch
        assert topk_idx.is_contiguous() and topk_idx.dtype == torch.int64 and len(topk_idx) == len(x)
        assert num_experts % self.size == 0 and self.size * max_tokens % 4 == 0
        assert self.get_low_latency_rdma_size_hint(max_tokens, x.shape[1], self.size, num_experts) <= self.bytes
        groups = x.float().unflatten(1, (-1, 128))
        exponents = torch.ceil(torch.log2(groups.abs().amax(-1, keepdim=True).clamp(min=1e-4) / FP8_MAX))
        scale = torch.exp2(exponents)
        sent = self.shared.meet(self.rank, ((groups / scale).to(torch.float8_e4m3fn).flatten(1), scale[..., 0], topk_idx))
        local, room = num_experts // self.size, max_tokens * self.size
        codes = torch.full((local, room, x.shape[1]), 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn)  # NaN where nothing arrives
        scales = torch.full((local, x.shape[1] // 128, room), torch.nan).transpose(1, 2)
        counts, sources = torch.zeros(local, dtype=torch.int32), []
        for rank, (rows, row_scales, topk) in enumerate(sent):
            for token, place in (topk // local == self.rank).nonzero().tolist():
                expert = int(topk[token, place]) % local
                codes[expert, counts[expert]] = rows[token]
                scales[expert, counts[expert]] = row_scales[token]
                sources.append((rank, token, place, expert, int(counts[expert])))
                counts[expert] += 1
        if self._next is None:  # one place for all layers; rows of the send buffer end with room for other formats
            self._next = torch.empty(local, room, _row_bytes(x.shape[1]) // 2, dtype=torch.bfloat16)[:, :, : x.shape[1]]
        self._next.fill_(torch.nan)
        return (codes, scales), counts, (sources, len(x)), None, None

    def get_next_low_latency_combine_buffer(self, handle: Any) -> torch.Tensor:
        assert self._next is not None
        return self._next

    def low_latency_combine(
        self, x: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor, handle: Any, zero_copy: bool = False
    ) -> tuple[Any, ...]:
        sent = self._next if zero_copy else x
        assert sent is not None
        assert x.is_contiguous() and x.dtype == torch.bfloat16 and x.shape == sent.shape  # low_latency_combine
        assert topk_idx.is_contiguous() and topk_weights.is_contiguous() and topk_weights.dtype == torch.float32
        sources, num_tokens = handle
        back = self.shared.meet(self.rank, [(rank, token, place, sent[expert, row]) for rank, token, place, expert, row in sources])
        total = torch.zeros(num_tokens, x.shape[2])
        for parts in back:
            for rank, token, place, row in parts:
                if rank == self.rank:
                    total[token] += topk_weights[token, place] * row.float()
        return total.bfloat16(), None, None


def _row_bytes(hidden: int) -> int:
    """Of a row that is sent back: bf16 values, and the extremes of each 128 (config.hpp)."""
    return 2 * hidden + 4 * (hidden // 128)


def _split(x: torch.Tensor, sources: Any) -> list[torch.Tensor]:
    return list(x.split([len(chosen) for _, chosen in sources]))

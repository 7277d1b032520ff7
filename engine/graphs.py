"""Decode steps as CUDA graphs: one for each bucket of batch size and context length, captured before the rank is ready.

A step copies its tokens, positions, slots and page table into fixed memory and replays the graph of the smallest bucket that holds
it; rows that are left over are fillers, for which nothing is stored. Nothing is compiled, allocated or waited for in a step.
"""

from __future__ import annotations

import bisect
import time

import numpy as np
import torch

from core.kv_layout import PAGE_TOKENS
from core.log import get_logger
from engine.batch import Batch, Chunk, TokenPlaces
from engine.cache.arena import ModelCaches
from engine.model.deepseek_v4 import DeepseekV4

log = get_logger("graphs")

PAGES_STEP = 32
"""Page tables of graphs are multiples of this: 64 rows of ratio-128 layers, what attention takes at a time."""
WIDTHS = (32, 128, 512, 2048, 4096)
"""Pages of a sequence in a graph: contexts of 8K, 32K, 128K, 512K and 1M tokens."""


def batch_buckets(most: int) -> list[int]:
    """1, 2, 4, 8, then in steps of a quarter of the power of two below, up to `most`: a fifth of a batch is filler at most."""
    sizes = [size for size in (1, 2, 4) if size < most]
    size = 8
    while size < most:
        sizes.append(size)
        size += max(8, 1 << (size.bit_length() - 3))
    return [*sizes, most]


def width_buckets(max_model_len: int) -> list[int]:
    """Pages of a sequence, up to the longest."""
    most = -(-max_model_len // (PAGE_TOKENS * PAGES_STEP)) * PAGES_STEP
    return [*(width for width in WIDTHS if width < most), most]


class DecodeGraphs:
    """Owner of the graphs and of the memory that they read and write."""

    def __init__(self, network: DeepseekV4, caches: ModelCaches, sizes: list[int], widths: list[int]) -> None:
        """`sizes`, `widths`: ascending, sequences of a step and pages of a sequence. Captures every bucket, the largest first; the memory
        of one serves the next."""
        self._network, self._caches, self._sizes, self._widths = network, caches, sizes, widths
        most, device = sizes[-1], caches.arena.pages.device
        # token ids, positions, slots; starts are the positions, every chunk being one token
        self._rows = torch.zeros(3, most, dtype=torch.int64, device=device)
        self._rows[1] = -1
        self._sequences = torch.arange(most, device=device)
        self._tables = {width: torch.full((most, width), -1, dtype=torch.int32, device=device) for width in self._widths}
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        began = time.monotonic()
        free = torch.cuda.mem_get_info(device)[0]
        for width in reversed(self._widths):
            for size in reversed(self._sizes):
                self._graphs[size, width] = self._capture(size, width)
        torch.cuda.synchronize(device)
        taken = free - torch.cuda.mem_get_info(device)[0]
        log.info("graphs.captured", count=len(self._graphs), seconds=round(time.monotonic() - began, 1), mib=taken >> 20)

    def holds(self, chunks: list[Chunk]) -> bool:
        """Whether a step of these chunks is a graph's."""
        is_decode = all(chunk.length == 1 and chunk.logits == "last" for chunk in chunks)
        return is_decode and len(chunks) <= self._sizes[-1]

    def run(self, chunks: list[Chunk], least: int = 0) -> torch.Tensor:
        """fp32 logits [n, vocab] of the chunks, valid until the next step. In a group all ranks give the same `least`, the number of
        rows that none of them exceeds."""
        graph, logits = self.fill(chunks, least)
        graph.replay()
        return logits[: len(chunks)]

    def fill(self, chunks: list[Chunk], least: int = 0) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        """Copy a step's inputs in; its graph, to be replayed, and the logits that it will write."""
        size = self._sizes[bisect.bisect_left(self._sizes, max(len(chunks), least))]
        most_pages = max((len(chunk.sequence.page_ids) for chunk in chunks), default=0)
        width = self._widths[bisect.bisect_left(self._widths, most_pages)]
        rows = np.zeros((3, size), dtype=np.int64)
        rows[1] = -1
        table = np.full((size, width), -1, dtype=np.int32)
        for row, chunk in enumerate(chunks):
            sequence = chunk.sequence
            rows[:, row] = sequence.token_ids[chunk.start], chunk.start, sequence.slot_id
            table[row, : len(sequence.page_ids)] = sequence.page_ids
        self._rows[:, :size].copy_(torch.from_numpy(rows).pin_memory(), non_blocking=True)
        self._tables[width][:size].copy_(torch.from_numpy(table).pin_memory(), non_blocking=True)
        return self._graphs[size, width]

    def _batch(self, size: int, width: int) -> Batch:
        token_ids, positions, slots = self._rows[:, :size]
        return Batch(
            token_ids_T=token_ids,
            places=TokenPlaces(
                positions_T=positions,
                sequences_T=self._sequences[:size],
                starts_T=positions,
                slots_T=slots,
                page_table_SP=self._tables[width][:size],
                is_decode=True,
            ),
            starts_S=(0,) * size,
            lengths_S=(1,) * size,
            longest=width * PAGE_TOKENS,
            logits_rows_R=None,
        )

    def _capture(self, size: int, width: int) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        batch, graph = self._batch(size, width), torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._network.forward(batch, self._caches)  # compiles what is not compiled yet
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            logits = self._network.forward(batch, self._caches)
        return graph, logits

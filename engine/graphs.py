"""Decode steps as CUDA graphs: one for each bucket of batch size and context length, captured before the rank is ready.

A step copies its tokens, positions, slots and page table into fixed memory and replays the graph of the smallest bucket that holds
it; rows that are left over are fillers, for which nothing is stored. Another graph draws the tokens, all kinds in one (but for filters).
Nothing is compiled, allocated or waited for in a step.

    inputs   drawn      tokens of the step before, by its rows: written by the device
             known      tokens that the host knows            -.
             source     of each row: where among `drawn` and `known` its token is
             position, slot; history, at, seed, top_k, temperature, top_p, min_p: of the draw    -' one copy from the host
"""

from __future__ import annotations

import bisect
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from core.kv_layout import PAGE_TOKENS
from core.log import get_logger
from core.request import TokenLogprobs
from engine.batch import Batch, Chunk, TokenPlaces
from engine.cache.arena import ModelCaches
from engine.histories import SlotHistories
from engine.logprobs import logprob_tensors, logprobs_from
from engine.model.deepseek_v4 import DeepseekV4
from engine.ops.sample import Draws, Filters, Histories
from engine.recorder import CudaRecorder, Graph, Recorder
from engine.sampler import has_filters, signed

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


_DRAWN, _KNOWN, _SOURCE, _POSITION, _SLOT, _HISTORY, _AT, _SEED, _TOP_K, _TEMPERATURE, _TOP_P, _MIN_P, _NUM_ROWS = range(13)
Sample = Callable[[torch.Tensor, Draws, Histories | None], torch.Tensor]
"""The op `sample`."""
_ALIGNED = 32
"""Rows begin at multiples of so many numbers."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """A step whose tokens are on their way to the host."""

    wait: Callable[[], None]
    """Until the step has ended; before that nothing else here may be read."""
    tokens: torch.Tensor
    """int64, one a chunk; -1: its logits are not finite."""
    logprobs: dict[int, tuple[torch.Tensor, ...]]
    """By chunk, where wanted: as `logprobs_from` takes them."""

    def read(self) -> tuple[list[int], dict[int, TokenLogprobs]]:
        self.wait()
        return self.tokens.tolist(), {row: logprobs_from(*tensors)[0] for row, tensors in self.logprobs.items()}


class DecodeGraphs:
    """Owner of the graphs and of the memory that they read and write."""

    def __init__(
        self,
        network: DeepseekV4,
        caches: ModelCaches,
        sizes: list[int],
        widths: list[int],
        sample: Sample | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        """`sizes`, `widths`: ascending, sequences of a step and pages of a sequence. Captures every bucket, the largest first; the memory
        of one serves the next. `sample`: the op, for `draw`; None: there is only `run`. `recorder`: None is that of the GPU."""
        self._network, self._caches, self._sizes, self._widths, self._sample = network, caches, sizes, widths, sample
        self._recorder = recorder or CudaRecorder()
        most, device = -(-sizes[-1] // _ALIGNED) * _ALIGNED, caches.arena.pages.device
        self._inputs = torch.zeros(_NUM_ROWS, most, dtype=torch.int64, device=device)
        self._inputs[_POSITION] = self._inputs[_HISTORY] = -1
        self._sequences = torch.arange(most, device=device)
        self._tables = {width: torch.full((sizes[-1], width), -1, dtype=torch.int32, device=device) for width in self._widths}
        self._logits = torch.zeros(sizes[-1], network.vocab_size, device=device)
        self._tokens = torch.zeros(sizes[-1], dtype=torch.int64, device=device)
        self._histories: SlotHistories | None = None
        if sample is not None:
            self._histories = SlotHistories(len(caches.arena.slots), network.vocab_size, device, self._recorder)
        began = time.monotonic()
        before = _free_bytes(device)
        record = self._recorder.record
        self._graphs: dict[tuple[int, int], Graph] = {}
        for width in reversed(self._widths):
            for size in reversed(self._sizes):
                self._graphs[size, width] = record(functools.partial(self._forward, size, width))
        self._draws: dict[tuple[int, bool], Graph] = {}
        for size in reversed(self._sizes) if sample is not None else ():
            for is_filtered in (True, False):
                self._draws[size, is_filtered] = record(functools.partial(self._draw, size, is_filtered))
        self._recorder.mark()()
        mib, count = (before - _free_bytes(device)) >> 20, len(self._graphs) + len(self._draws)
        log.info("graphs.captured", count=count, seconds=round(time.monotonic() - began, 1), mib=mib)

    def holds(self, chunks: list[Chunk]) -> bool:
        """Whether a step of these chunks is a graph's."""
        is_decode = all(chunk.length == 1 and chunk.logits == "last" for chunk in chunks)
        return is_decode and len(chunks) <= self._sizes[-1]

    def run(self, chunks: list[Chunk], budget: int = 0, rows_before: list[int] | None = None) -> torch.Tensor:
        """fp32 logits [n, vocab] of the chunks, valid until the next step. In a group all ranks give the same `budget`, the number of
        rows that none of them exceeds. `rows_before`: for each chunk the row of the step before whose token it takes in, -1: the host
        knows the token."""
        graph, logits = self.fill(chunks, budget, rows_before)
        graph.replay()
        return logits[: len(chunks)]

    def draw(self, chunks: list[Chunk], budget: int = 0, rows_before: list[int] | None = None) -> Drawn:
        """As `run`, and draws the tokens; waits for nothing."""
        assert self._histories is not None
        graph, logits = self.fill(chunks, budget, rows_before, self._histories.slots_of(chunks))
        graph.replay()
        logprobs: dict[int, tuple[torch.Tensor, ...]] = {}
        if chunks:
            is_filtered = any(has_filters(chunk.sequence.request.sampling) for chunk in chunks)
            self._draws[self._size(len(chunks), 0), is_filtered].replay()
        for row, chunk in enumerate(chunks):
            num_top = chunk.sequence.request.sampling.num_logprobs
            if num_top is not None:
                tensors = logprob_tensors(logits[row : row + 1], self._inputs[_DRAWN, row : row + 1], num_top)
                logprobs[row] = tuple(self._recorder.fetch(tensor) for tensor in tensors)
        tokens = self._recorder.fetch(self._tokens[: len(chunks)])
        return Drawn(self._recorder.mark(), tokens, logprobs)

    def fill(
        self, chunks: list[Chunk], budget: int = 0, rows_before: list[int] | None = None, histories: list[int] | None = None
    ) -> tuple[Graph, torch.Tensor]:
        """Copy a step's inputs in; its graph, to be replayed, and the logits that it will write. `histories`: for each chunk what
        `SlotHistories.slots_of` says, if tokens are to be drawn."""
        size = self._size(len(chunks), budget)
        most_pages = max((len(chunk.sequence.page_ids) for chunk in chunks), default=0)
        width = self._widths[bisect.bisect_left(self._widths, most_pages)]
        most = self._inputs.shape[1]
        inputs = np.zeros((_NUM_ROWS, most), dtype=np.int64)
        floats = inputs.view(np.float64)
        inputs[_POSITION], inputs[_SOURCE], inputs[_HISTORY], floats[_TOP_P] = -1, most + np.arange(most), -1, 1.0
        if histories is not None:
            inputs[_HISTORY, : len(chunks)] = histories
        table = np.full((size, width), -1, dtype=np.int32)
        for row, chunk in enumerate(chunks):
            sequence, before = chunk.sequence, -1 if rows_before is None else rows_before[row]
            if before < 0:
                inputs[_KNOWN, row] = sequence.token_ids[chunk.start]
            else:
                inputs[_SOURCE, row] = before
            inputs[_POSITION, row], inputs[_SLOT, row], inputs[_AT, row] = chunk.start, sequence.slot_id, chunk.end
            sampling = sequence.request.sampling
            inputs[_SEED, row], inputs[_TOP_K, row] = signed(sampling.seed), sampling.top_k
            floats[_TEMPERATURE, row], floats[_TOP_P, row], floats[_MIN_P, row] = sampling.temperature, sampling.top_p, sampling.min_p
            table[row, : len(sequence.page_ids)] = sequence.page_ids
        self._recorder.put(self._inputs[_KNOWN:], inputs[_KNOWN:])
        self._recorder.put(self._tables[width][:size], table)
        return self._graphs[size, width], self._logits[:size]

    def _size(self, count: int, budget: int) -> int:
        return self._sizes[bisect.bisect_left(self._sizes, max(count, budget))]

    @torch.inference_mode()
    def _forward(self, size: int, width: int) -> None:
        """What the graph of a bucket does."""
        positions = self._inputs[_POSITION, :size]
        batch = Batch(
            token_ids_T=self._inputs.view(-1)[self._inputs[_SOURCE, :size]],
            places=TokenPlaces(
                positions_T=positions,
                sequences_T=self._sequences[:size],
                starts_T=positions,
                slots_T=self._inputs[_SLOT, :size],
                page_table_SP=self._tables[width][:size],
                is_decode=True,
            ),
            starts_S=(0,) * size,
            lengths_S=(1,) * size,
            longest=width * PAGE_TOKENS,
            logits_rows_R=None,
        )
        self._logits[:size].copy_(self._network.forward(batch, self._caches))

    @torch.inference_mode()
    def _draw(self, size: int, is_filtered: bool) -> None:
        """What the graph after it does. A row without finite logits feeds on token 0: its request fails before anybody sees more."""
        assert self._sample is not None and self._histories is not None
        row, number = self._inputs[:, :size], self._inputs.view(torch.float64)[:, :size]
        filters = Filters(row[_TOP_K], number[_TOP_P], number[_MIN_P]) if is_filtered else None
        draws = Draws(number[_TEMPERATURE], row[_SEED], row[_AT], filters, row[_HISTORY])
        tokens = self._sample(self._logits[:size], draws, self._histories.memory)
        self._tokens[:size].copy_(tokens)
        torch.clamp(tokens, min=0, out=self._inputs[_DRAWN, :size])


def _free_bytes(device: torch.device) -> int:
    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else 0

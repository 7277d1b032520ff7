"""Runner: one step of a model over a set of chunks. What the loops of the workers and the engine drive.

    newest = runner.launch(chunks)         step n + 1; inputs that step n computes are taken from it where they are
    results = runner.collect(launched)     step n: waits for it, gives its tokens to the sequences

At most one step is under way when another is launched, and they are collected in their order.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch

from core.errors import BatonError, InternalError
from core.kv_layout import KVLayout
from core.request import FinishReason, TokenLogprobs
from engine.batch import Chunk, Feedback, build_batch
from engine.cache.arena import Arena
from engine.graphs import DecodeGraphs, Drawn, batch_buckets, width_buckets
from engine.histories import history_bytes
from engine.logprobs import logprobs_of
from engine.parallel.rebalance import moving_bytes
from engine.sampler import sample
from engine.sequence import Sequence
from engine.widening import widen_experts, widen_outputs
from engine.workspace import measure_workspace, warm_products

if TYPE_CHECKING:
    from engine.engine import LoadedModel


@dataclass(frozen=True, slots=True)
class ChunkResult:
    sequence: Sequence
    token: int | None = None
    """Sampled when the chunk reached the end of its sequence; already appended to it."""
    logprobs: TokenLogprobs | None = None
    """Of `token`, if the request wants them."""
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    """Of prompt tokens [prompt_logprobs_start, ...), if the request wants them."""
    prompt_logprobs_start: int = 0
    error: BatonError | None = None
    """Why there is no token where one was due: nothing more can come of the sequence. The others of the step are well."""


@dataclass(frozen=True, slots=True)
class Launched:
    """A step under way: what `launch` leaves for `collect`. Opaque to all but the runner that made it, save for the chunks."""

    chunks: list[Chunk]
    tokens: torch.Tensor | None = None
    """int64, one a chunk, on the device; -1 where the chunk does not reach the end of its sequence, or its logits are not finite."""
    drawn: Drawn | None = None
    """In place of `tokens` and `logprobs`: they are drawn by the device, and on their way."""
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)
    """By chunk, where wanted."""
    prompt_logprobs: dict[int, tuple[TokenLogprobs, ...]] = field(default_factory=dict)


class Runner(Protocol):
    layout: KVLayout
    arena: Arena
    vocab_size: int
    max_model_len: int

    def clear_slot(self, slot_id: int) -> None:
        """Make a slot that of an empty sequence. To be called when a slot gets an owner."""
        ...

    def arrived(self, page_ids: tuple[int, ...], slot_id: int) -> None:
        """Pages and a slot have been written by somebody else: a transfer."""
        ...

    def launch(self, chunks: list[Chunk], budget: int = 0) -> Launched:
        """Start the forward pass of the chunks and the sampling for those that reach the end of their sequence, whose num_computed grows
        by the chunk's length. The chunks must not be empty, but in a group: there all ranks step together, and `budget` is the number of
        tokens that none of them exceeds in this step. Pages and slots of the sequences may be read and written until `collect` returns,
        whatever becomes of the sequences meanwhile. When it raises nothing is under way, and no sequence has changed."""
        ...

    def may_lead(self, launched: Launched) -> bool:
        """Whether another step may be launched before this one is collected."""
        ...

    def collect(self, launched: Launched) -> list[ChunkResult]:
        """Wait for the step, append the tokens, set finish_reason where one is the last. Results in the order of the chunks; those of
        sequences that had ended before are left out: that they would was not known when the step was launched. A sequence that fails
        alone says so in its result. When this returns or raises the step has ended: all that it writes to pages and slots is there, for
        whoever reads them next."""
        ...

    def step(self, chunks: list[Chunk], budget: int = 0) -> list[ChunkResult]:
        """Launch and collect."""
        ...


def finish_reason_of(sequence: Sequence, eos_token_id: int) -> FinishReason | None:
    """Whether the newest token ends the sequence."""
    sampling, token = sequence.request.sampling, sequence.token_ids[-1]
    if token in sampling.stop_token_ids or (token == eos_token_id and not sampling.ignore_eos):
        return FinishReason.STOP
    return FinishReason.LENGTH if sequence.num_output_tokens >= sampling.max_tokens else None


def fed_rows(chunks: list[Chunk], before: Launched | None) -> list[int]:
    """For each chunk the row of the step before, not collected yet, whose token is its last one; -1: its tokens are known."""
    rows = {id(chunk.sequence): row for row, chunk in enumerate(before.chunks)} if before is not None else {}
    return [rows[id(chunk.sequence)] if chunk.end > len(chunk.sequence.token_ids) else -1 for chunk in chunks]


class ModelRunner:
    """The real one."""

    def __init__(
        self,
        loaded: LoadedModel,
        num_pages: int,
        num_slots: int,
        *,
        chunk_tokens: int = 0,
        max_decode: int = 0,
        widened_layers: int = 0,
    ) -> None:
        """num_pages 0: as many as fit, on a GPU. There the largest steps are run before: prompts in chunks of `chunk_tokens`, and decode
        steps of `max_decode` sequences, which are CUDA graphs; 0: none such. `widened_layers`: as `widen_experts` has it; wo_a as
        `widen_outputs` has it."""
        self._loaded = loaded
        on_gpu = loaded.device.type == "cuda"
        if on_gpu and chunk_tokens:
            warm_products(loaded, chunk_tokens)
        workspace = measure_workspace(loaded, chunk_tokens, max_decode) if on_gpu else 0
        has_histories = max_decode > 0 and on_gpu and loaded.device_sample is not None
        history = history_bytes(loaded.model.vocab_size) if has_histories else 0
        reserved = workspace + 2 * moving_bytes(loaded)  # an expert that comes is not twice as large once it is widened
        reserved += num_slots * history
        if widened_layers and widen_experts(loaded, widened_layers, num_pages, num_slots, reserved) and on_gpu:
            workspace = measure_workspace(loaded, chunk_tokens, max_decode)  # the wide form has kernels of its own
        widen_outputs(loaded, max_decode, num_pages, num_slots, reserved)
        workspace += moving_bytes(loaded)
        self._caches = loaded.new_caches(num_pages, num_slots, workspace, history)
        self._graphs: DecodeGraphs | None = None
        if max_decode and on_gpu:
            widths = width_buckets(loaded.engine.max_model_len)
            self._graphs = DecodeGraphs(loaded.network, self._caches, batch_buckets(max_decode), widths, loaded.device_sample)
        self._overlaps = loaded.engine.overlap == "on" or (loaded.engine.overlap == "auto" and self._graphs is not None)
        self._newest: Launched | None = None
        self.arena = self._caches.arena
        self.layout = loaded.layout
        self.vocab_size = loaded.model.vocab_size
        self.max_model_len = loaded.engine.max_model_len

    def clear_slot(self, slot_id: int) -> None:
        self._caches.clear_slot(slot_id)

    def arrived(self, page_ids: tuple[int, ...], slot_id: int) -> None:
        """They lie where they are read."""

    def may_lead(self, launched: Launched) -> bool:
        """Graphs find tokens only where graphs have drawn them."""
        return self._overlaps if self._graphs is None else launched.drawn is not None

    def step(self, chunks: list[Chunk], budget: int = 0) -> list[ChunkResult]:
        return self.collect(self.launch(chunks, budget))

    def launch(self, chunks: list[Chunk], budget: int = 0) -> Launched:
        if self._loaded.share is not None:
            self._loaded.share.begin_step(budget if self._loaded.heads is None else self._loaded.heads.rows_each(budget))
        else:
            assert chunks, "a step needs at least one chunk"
        rows = fed_rows(chunks, self._newest)
        if self._graphs is not None and self._graphs.holds(chunks):
            launched = self._replayed(self._graphs, chunks, budget, rows)
        elif not chunks:
            self._loaded.network.join()
            launched = Launched(chunks)
        else:
            feedback = None if self._newest is None or self._newest.tokens is None else Feedback(self._newest.tokens, rows)
            batch = build_batch(chunks, self._loaded.device, feedback)
            launched = self._with_tokens(chunks, self._loaded.network.forward(batch, self._caches), feedback)
        for chunk in chunks:
            chunk.sequence.num_computed = chunk.end
        self._newest = launched
        return launched

    def collect(self, launched: Launched) -> list[ChunkResult]:
        if launched is self._newest:
            self._newest = None
        logprobs = launched.logprobs
        if launched.drawn is not None:
            tokens, logprobs = launched.drawn.read()
            self._check_group()
        else:
            tokens = [] if launched.tokens is None else launched.tokens.tolist()
            if self._loaded.device.type == "cuda":
                torch.cuda.current_stream().synchronize()
            self._check_group()
        results = []
        for place, (chunk, token) in enumerate(zip(launched.chunks, tokens, strict=True)):
            sequence = chunk.sequence
            if sequence.finish_reason is not None:
                continue
            prompt = launched.prompt_logprobs.get(place, ())
            if token < 0:
                is_due = chunk.end >= len(sequence.token_ids)
                error = InternalError(f"the logits of {sequence.request_id} are not finite") if is_due else None
                results.append(ChunkResult(sequence, None, None, prompt, chunk.start + 1, error))
                continue
            sequence.token_ids.append(token)
            sequence.finish_reason = finish_reason_of(sequence, self._loaded.model.eos_token_id)
            results.append(ChunkResult(sequence, token, logprobs.get(place), prompt, chunk.start + 1))
        return results

    def _check_group(self) -> None:
        """The step has ended on the device: raises GroupLost if it did so without a rank of the group."""
        if self._loaded.share is not None:
            self._loaded.share.check()

    def _replayed(self, graphs: DecodeGraphs, chunks: list[Chunk], budget: int, rows_before: list[int]) -> Launched:
        """The device draws the tokens, unless a step waits for the last one anyway."""
        if self._overlaps:
            return Launched(chunks, drawn=graphs.draw(chunks, budget, rows_before))
        return self._with_tokens(chunks, graphs.run(chunks, budget, rows_before))

    def _with_tokens(self, chunks: list[Chunk], logits: torch.Tensor, feedback: Feedback | None = None) -> Launched:
        """Sampled by the host, which waits for the logits. `feedback`: where tokens are that the sequences do not have yet."""
        if logits.is_cuda:
            torch.cuda.current_stream().synchronize()
        self._check_group()
        ends, row = [], 0
        for chunk in chunks:
            row += {"last": 1, "all": chunk.length, "none": 0}[chunk.logits]
            ends.append(row)
        due = [place for place, chunk in enumerate(chunks) if chunk.end >= len(chunk.sequence.token_ids)]
        fed = [-1] * len(chunks) if feedback is None else feedback.tokens_of_rows()
        last_rows, sequences = [ends[place] - 1 for place in due], [chunks[place].sequence for place in due]
        sampled = dict(zip(due, sample(logits[last_rows], sequences, [fed[place] for place in due]), strict=True))
        logprobs, prompt_logprobs = {}, {}
        for place, chunk in enumerate(chunks):
            sampling = chunk.sequence.request.sampling
            if sampled.get(place, -1) >= 0 and sampling.num_logprobs is not None:
                row_of = logits[ends[place] - 1 : ends[place]]
                logprobs[place] = logprobs_of(row_of, [sampled[place]], sampling.num_logprobs)[0]
            if chunk.logits == "all" and sampling.num_prompt_logprobs is not None:
                # The row of token t predicts token t + 1; past the prompt's end there is nothing to report.
                targets = chunk.sequence.token_ids[chunk.start + 1 : min(chunk.end + 1, chunk.sequence.request.prompt_len)]
                first = ends[place] - chunk.length
                prompt_logprobs[place] = logprobs_of(logits[first : first + len(targets)], targets, sampling.num_prompt_logprobs)
        tokens = torch.tensor([sampled.get(place, -1) for place in range(len(chunks))], dtype=torch.int64, device=self._loaded.device)
        if self._loaded.heads is not None:
            tokens = self._loaded.heads.led(tokens)
        return Launched(chunks, tokens, logprobs=logprobs, prompt_logprobs=prompt_logprobs)

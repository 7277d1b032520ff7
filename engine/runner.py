"""Runner: one step of a model over a set of chunks. What the loops of the workers and the engine drive."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from core.kv_layout import KVLayout
from core.request import FinishReason, TokenLogprobs
from engine.batch import Chunk, build_batch
from engine.cache.arena import Arena
from engine.graphs import DecodeGraphs, batch_buckets, width_buckets
from engine.logprobs import logprobs_of
from engine.sampler import sample
from engine.sequence import Sequence
from engine.workspace import measure_workspace

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


class Runner(Protocol):
    """`step` runs the forward pass, samples for every chunk that reaches the end of its sequence, and advances the sequences:
    num_computed grows by the chunk's length, the token is appended, finish_reason is set when it is the last."""

    layout: KVLayout
    arena: Arena
    vocab_size: int
    max_model_len: int

    def clear_slot(self, slot_id: int) -> None:
        """Make a slot that of an empty sequence. To be called when a slot gets an owner."""
        ...

    def step(self, chunks: list[Chunk], batch: int = 0) -> list[ChunkResult]:
        """Results in the order of the chunks, which must not be empty, but in a group: there all ranks step together, and `batch` is
        the number of tokens that none of them exceeds in this step. When it returns, all that the step writes to pages and slots
        is there, for whoever reads them next."""
        ...


def finish_reason_of(sequence: Sequence, eos_token_id: int) -> FinishReason | None:
    """Whether the newest token ends the sequence."""
    sampling, token = sequence.request.sampling, sequence.token_ids[-1]
    if token in sampling.stop_token_ids or (token == eos_token_id and not sampling.ignore_eos):
        return FinishReason.STOP
    return FinishReason.LENGTH if sequence.num_output_tokens >= sampling.max_tokens else None


class ModelRunner:
    """The real one."""

    def __init__(self, loaded: LoadedModel, num_pages: int, num_slots: int, *, chunk_tokens: int = 0, max_decode: int = 0) -> None:
        """num_pages 0: as many as fit, on a GPU. There the largest steps are run before: prompts in chunks of `chunk_tokens`, and decode
        steps of `max_decode` sequences, which are CUDA graphs; 0: none such."""
        self._loaded = loaded
        on_gpu = loaded.device.type == "cuda"
        workspace = measure_workspace(loaded, chunk_tokens, max_decode) if on_gpu else 0
        self._caches = loaded.new_caches(num_pages, num_slots, workspace)
        self._graphs: DecodeGraphs | None = None
        if max_decode and on_gpu:
            widths = width_buckets(loaded.engine.max_model_len)
            self._graphs = DecodeGraphs(loaded.network, self._caches, batch_buckets(max_decode), widths)
        self.arena = self._caches.arena
        self.layout = loaded.layout
        self.vocab_size = loaded.model.vocab_size
        self.max_model_len = loaded.engine.max_model_len

    def clear_slot(self, slot_id: int) -> None:
        self._caches.clear_slot(slot_id)

    def step(self, chunks: list[Chunk], batch: int = 0) -> list[ChunkResult]:
        if self._loaded.share is not None:
            self._loaded.share.begin_step(batch)
        else:
            assert chunks, "a step needs at least one chunk"
        if self._graphs is not None and self._graphs.holds(chunks):
            logits = self._graphs.run(chunks, batch)
        elif not chunks:
            self._loaded.network.join()
            return []
        else:
            logits = self._loaded.network.forward(build_batch(chunks, self._loaded.device), self._caches)
        ends, row = [], 0
        for chunk in chunks:
            row += {"last": 1, "all": chunk.length, "none": 0}[chunk.logits]
            ends.append(row)
        due = [i for i, chunk in enumerate(chunks) if chunk.start + chunk.length == len(chunk.sequence.token_ids)]
        sampled = dict(zip(due, sample(logits[[ends[i] - 1 for i in due]], [chunks[i].sequence for i in due]), strict=True))
        results = []
        for place, chunk in enumerate(chunks):
            sequence, start = chunk.sequence, chunk.start
            prompt: tuple[TokenLogprobs, ...] = ()
            wanted = sequence.request.sampling.num_prompt_logprobs
            if chunk.logits == "all" and wanted is not None:
                # The row of token t predicts token t + 1; past the prompt's end there is nothing to report.
                targets = sequence.token_ids[start + 1 : min(start + chunk.length + 1, sequence.request.prompt_len)]
                first = ends[place] - chunk.length
                prompt = logprobs_of(logits[first : first + len(targets)], targets, wanted)
            sequence.num_computed += chunk.length
            token, logprobs = None, None
            if place in sampled:
                token = sampled[place]
                sequence.token_ids.append(token)
                sequence.finish_reason = finish_reason_of(sequence, self._loaded.model.eos_token_id)
                if sequence.request.sampling.num_logprobs is not None:
                    row_of = logits[ends[place] - 1 : ends[place]]
                    logprobs = logprobs_of(row_of, [token], sequence.request.sampling.num_logprobs)[0]
            results.append(ChunkResult(sequence, token, logprobs, prompt, start + 1))
        if self._loaded.device.type == "cuda" and not due:
            torch.cuda.current_stream().synchronize()  # a sampled token has waited for the step; chunks without one have not
        return results

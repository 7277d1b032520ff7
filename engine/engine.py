"""Load a model, and run it alone: continuous batching of a list of requests in one process.

The workers use the same parts (`LoadedModel`, planners, allocators, `ModelRunner`) with their own loops around them.
"""

from __future__ import annotations

import collections
import dataclasses
import pathlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch

from core.errors import ConfigError, InvalidRequest
from core.kv_layout import KVLayout
from core.log import get_logger
from core.request import FinishReason, Request, TokenLogprobs
from engine.cache.arena import Arena, ModelCaches
from engine.cache.layout import build_layout
from engine.config import EngineConfig, ModelConfig
from engine.graphs import Sample
from engine.limits import check_fits
from engine.memory_plan import MemoryPlan, tensor_bytes
from engine.model.deepseek_v4 import DeepseekV4
from engine.model.quantized import Weight
from engine.model.shards import checkpoint_identity
from engine.model.weights import dummy_weights, open_weights
from engine.ops.registry import BoundOps, bind
from engine.parallel.experts import ExpertShare, Sharing
from engine.parallel.heads import HeadShare
from engine.runner import ChunkResult, Launched, ModelRunner
from engine.scheduler.decode import DecodePlanner
from engine.scheduler.pages import PageAllocator, SlotAllocator
from engine.scheduler.prefill import PrefillPlanner
from engine.sequence import Sequence

log = get_logger("engine")


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A checkpoint in memory, ready to run; owns no caches."""

    model: ModelConfig
    engine: EngineConfig
    network: DeepseekV4
    layout: KVLayout
    ops: BoundOps
    device: torch.device
    share: ExpertShare | None = None
    """In a group: which of the experts are here."""
    heads: HeadShare | None = None
    """Where ranks attend together: which of the heads are here."""
    everything: Mapping[str, Weight] = field(default_factory=dict)
    """Every tensor of the checkpoint, read when asked for: where experts that move to this rank come from."""

    @staticmethod
    def load(folder: pathlib.Path, engine: EngineConfig, sharing: Sharing | None = None) -> LoadedModel:
        """`sharing`: load one rank's part of a group's model. Raises CheckpointError or ConfigError before any weight is read. Prints
        nothing; logs the chosen backends."""
        model = ModelConfig.from_folder(folder)
        device = resolve_device(engine.device)
        if engine.max_model_len > model.max_position_embeddings:
            limit = model.max_position_embeddings
            raise ConfigError(f"engine.max_model_len is {engine.max_model_len}; the model's max_position_embeddings is {limit}")
        is_dummy = engine.load == "dummy"
        layout = build_layout(model, engine, f"{folder.resolve().name}@{'dummy' if is_dummy else checkpoint_identity(folder)}")
        ops = bind(engine, device)
        torch.set_num_threads(engine.threads)
        share = None if sharing is None else ExpertShare.open(sharing, model, ops, device)
        heads = None if sharing is None or sharing.attention_tp == 1 else HeadShare(sharing.group, sharing.attention_tp, model)
        everything = dummy_weights(model, device, skew=engine.dummy_skew) if is_dummy else open_weights(folder, model, device)
        weights = everything if share is None else everything.only(share.is_wanted)
        log.info("engine.loaded", model=layout.model, device=device, fingerprint=layout.fingerprint())
        for line in ops.table().splitlines():
            log.info("engine.op", choice=line)
        network = DeepseekV4(model, engine, weights, ops, share, heads)
        return LoadedModel(model, engine, network, layout, ops, device, share, heads, everything)

    @property
    def device_sample(self) -> Sample | None:
        """The op that draws tokens in decode graphs; None: the host does."""
        if self.engine.overlap == "off":
            return None
        draw, heads = self.ops.sample, self.heads
        return draw if heads is None else lambda *arguments: heads.led(draw(*arguments))

    def memory_plan(self, num_pages: int, num_slots: int, workspace_bytes: int = 0, history_bytes: int = 0) -> MemoryPlan:
        return MemoryPlan.of(
            self.layout,
            num_pages,
            num_slots,
            least_pages=self.layout.num_pages(self.engine.max_model_len),
            weights_bytes=tensor_bytes(self.network),
            device=self.device,
            workspace_bytes=workspace_bytes,
            history_bytes=history_bytes,
            num_widened=self.network.num_widened,
            wide_outputs=self.network.wide_outputs,
        )

    def new_caches(self, num_pages: int, num_slots: int, workspace_bytes: int = 0, history_bytes: int = 0) -> ModelCaches:
        """num_pages 0: as many as fit beside `workspace_bytes` and the slots' `history_bytes`, on every rank where ranks attend together.
        Raises ConfigError naming the knobs if the memory is not there."""
        plan = self.memory_plan(num_pages, num_slots, workspace_bytes, history_bytes)
        if self.heads is not None and self.share is not None:
            plan = dataclasses.replace(plan, num_pages=self.share.least("pages", plan.num_pages))
        for line in plan.table().splitlines():
            log.info("engine.memory", plan=line)
        plan.check()
        arena = Arena(self.layout, plan.num_pages, num_slots, self.device, in_fabric=self.engine.fabric_memory)
        return ModelCaches(arena, self.model)


def resolve_device(wanted: str) -> torch.device:
    """ "auto" is the GPU if there is one. Raises ConfigError for "cuda" without one."""
    has_gpu = torch.cuda.is_available()
    if wanted == "cuda" and not has_gpu:
        raise ConfigError(f"engine.device is 'cuda', but torch {torch.__version__} finds no GPU here; use 'cpu' or 'auto'")
    return torch.device("cuda", torch.cuda.current_device()) if has_gpu and wanted != "cpu" else torch.device("cpu")


@dataclass(slots=True)
class Generation:
    """What became of one request."""

    request_id: str
    token_ids: list[int]
    """Output only, the end token included."""
    logprobs: list[TokenLogprobs]
    prompt_logprobs: list[TokenLogprobs]
    finish_reason: FinishReason | None = None


class Engine:
    """One model, its caches and planners: prefill and decode in one place."""

    def __init__(self, loaded: LoadedModel, *, num_pages: int, num_slots: int, max_running: int = 16, chunk_tokens: int = 256) -> None:
        self.loaded = loaded
        self._runner = ModelRunner(loaded, num_pages, num_slots)
        self.arena = self._runner.arena
        self._pages, self._slots = PageAllocator(num_pages), SlotAllocator(num_slots)
        self._prefill = PrefillPlanner(chunk_tokens=chunk_tokens, max_sequences=max_running)
        self._decode = DecodePlanner(max_running=max_running)
        self._max_running = min(max_running, num_slots)

    def generate(self, requests: Iterable[Request], on_token: Callable[[str, int], None] | None = None) -> list[Generation]:
        """Run all requests to their ends, in continuous batches; results in the order given. A request that can never fit raises
        InvalidRequest before anything runs, one that fails InternalError. `on_token(request_id, token)` sees each token as it is made."""
        sequences = [Sequence.from_request(request) for request in requests]
        results: dict[str, Generation] = {}
        for sequence in sequences:
            self._check(sequence.request)
            if sequence.request_id in results:
                raise InvalidRequest(f"two requests are named {sequence.request_id!r}", param="request_id")
            results[sequence.request_id] = Generation(sequence.request_id, [], [], [])
        try:
            self._run(sequences, results, on_token)
        finally:
            for sequence in sequences:
                self._release(sequence)
        self._pages.check_integrity()
        return [results[sequence.request_id] for sequence in sequences]

    def _check(self, request: Request) -> None:
        check_fits(request, self.loaded.model.vocab_size, self.loaded.engine.max_model_len)
        pages = self.loaded.layout.num_pages(request.max_total_tokens)
        if pages > self._pages.num_total:
            raise InvalidRequest(f"{request.request_id} needs {pages} pages; there are {self._pages.num_total}", param="max_tokens")

    def _run(self, sequences: list[Sequence], results: dict[str, Generation], on_token: Callable[[str, int], None] | None) -> None:
        waiting, running = collections.deque(sequences), list[Sequence]()

        def collect(launched: Launched) -> None:
            # Pages are free at once, though another step under way may write to them: whatever uses them next is launched after it.
            for result in self._runner.collect(launched):
                self._record(result, results[result.sequence.request_id], on_token)
                if result.sequence.finish_reason is not None:
                    running.remove(result.sequence)
                    self._release(result.sequence)

        under_way: Launched | None = None
        while waiting or running or under_way is not None:
            # A sequence gets the pages of its longest possible self, so nothing is ever preempted here.
            while waiting and len(running) < self._max_running and self._admit(waiting[0]):
                running.append(waiting.popleft())
            chunks = self._prefill.plan([s for s in running if s.num_remaining > 1 or s.num_computed == 0])
            if not chunks:
                chunks = self._decode.plan(running, self._pages).chunks
            newest = self._runner.launch(chunks) if chunks else None
            if under_way is not None:
                collect(under_way)
            under_way = newest
            if under_way is not None and not self._runner.may_lead(under_way):
                collect(under_way)
                under_way = None

    def _release(self, sequence: Sequence) -> None:
        self._pages.free(sequence.request_id)
        self._slots.free(sequence.request_id)

    def _admit(self, sequence: Sequence) -> bool:
        pages = self._pages.allocate(sequence.request_id, self.loaded.layout.num_pages(sequence.request.max_total_tokens))
        if pages is None:
            return False
        slots = self._slots.allocate(sequence.request_id, 1)
        assert slots is not None, "running is bounded by the number of slots"
        sequence.page_ids, sequence.slot_id = pages, slots[0]
        self._runner.clear_slot(sequence.slot_id)
        return True

    def _record(self, result: ChunkResult, into: Generation, on_token: Callable[[str, int], None] | None) -> None:
        if result.error is not None:
            raise result.error
        into.prompt_logprobs += result.prompt_logprobs
        if result.token is None:
            return
        into.token_ids.append(result.token)
        if result.logprobs is not None:
            into.logprobs.append(result.logprobs)
        into.finish_reason = result.sequence.finish_reason
        if on_token is not None:
            on_token(into.request_id, result.token)

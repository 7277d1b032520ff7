"""Count what a decode step launches on a GPU, layer by layer, without one: `python -m tests.benchmarks.launches [--ranks 2] [--batch 1]`.
With them step_model.py, whose other figures were measured, says how long a step of V4-Flash would take on as many H200s.

A small model with V4-Flash's structure takes one step on the CPU with the Triton backends bound. Their kernels are noted in place of being
run (what they would write stays zero), collectives too, and each torch operation that computes or moves data counts as one launch,
as CUDA graphs have it. Where a library takes a kernel's place the count is the same: FlashMLA's decode is two launches, as ours.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import inspect
import json
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import JITFunction

from core.kv_layout import PAGE_TOKENS
from core.request import Request, SamplingParams
from engine.batch import Batch, Chunk, TokenPlaces, build_batch
from engine.cache.arena import Arena, ModelCaches
from engine.cache.layout import build_layout
from engine.config import EngineConfig, ModelConfig
from engine.model.deepseek_v4 import DeepseekV4
from engine.model.side_stream import SideStream
from engine.model.weights import dummy_weights
from engine.ops.expert_exchange import ExchangeShape, ExpertExchange
from engine.ops.expert_exchange.direct import DirectExchange
from engine.ops.expert_exchange.gather import GatherExchange, PaddedGatherExchange
from engine.ops.names import OP_NAMES
from engine.ops.registry import BoundOps, get_op, load_backend
from engine.parallel.experts import ExpertShare, Sharing
from engine.parallel.group import Group, Limits, Seat
from engine.sequence import Sequence as Tokens
from tests.benchmarks.hardware import AS_MEASURED, H200
from tests.benchmarks.scaling_model import work_of
from tests.benchmarks.step_model import decode_parts

T = TypeVar("T")
SHAPE = pathlib.Path(__file__).parents[2] / "deploy" / "model_shapes" / "v4_flash" / "config.json"
SMALL: dict[str, Any] = {
    "hidden_size": 512, "vocab_size": 512, "num_attention_heads": 8, "q_lora_rank": 256, "o_groups": 2, "o_lora_rank": 128,
    "n_routed_experts": 8, "moe_intermediate_size": 128, "num_nextn_predict_layers": 0,
    "num_hidden_layers": 6, "num_hash_layers": 3, "compress_ratios": [0, 4, 128, 0, 4, 128],
}  # fmt: skip
PAGES = 32
"""The narrowest decode graph's: longer than the indexer's top-k."""
FORWARD = inspect.unwrap(DeepseekV4.forward)
"""In inference mode torch would show composite operations whole."""
PRODUCTS = ("vector_kernel", "fp8_linear_few_kernel", "linear_few_kernel", "grouped_linear_kernel", "moe_hidden_kernel", "moe_out_kernel")
"""Kernels that read weights."""
FREE = ("empty", "empty_like", "empty_strided", "new_empty", "detach", "alias", "_local_scalar_dense")

Launches = dict[str, collections.Counter[str]]
"""Part of the step -> launches by name."""
Chain = collections.Counter[str]
"""Launches that follow one another."""
PrefillStep = tuple[tuple[int, int], ...]
"""Of each chunk its tokens, and those of its sequence up to its end."""
Key = tuple[str, tuple[object, ...]]
"""What a kernel is compiled anew for: constants and options, and of each argument what Triton specialises for."""


class Recorder(TorchDispatchMode):
    """Notes torch operations; memory that a kernel should have filled is zero."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Launches = {}
        self.chains: Launches = {}
        """The longest chain of each part."""
        self.keys: set[Key] = set()
        """Of the kernels launched."""
        self.part = "before the layers"
        self._stream: SideStream | None = None
        self._chains: dict[SideStream | None, Chain] = {}

    def begin(self, part: str) -> None:
        """All streams have met."""
        self.part, self._chains = part, {}

    def note(self, name: str) -> None:
        self.found.setdefault(self.part, collections.Counter())[name] += 1
        self._follow(self._stream, self._chain(self._stream) + Chain((name,)))

    def start(self, side: SideStream, work: Callable[[], T]) -> Callable[[], T]:
        """As `SideStream.start`: what `side` does begins when it and the stream that calls have done what they had to."""
        before, self._stream = self._stream, side
        self._follow(side, max(self._chain(side), self._chain(before), key=Chain.total))
        result, done = work(), self._chain(side)
        self._stream = before

        def join() -> T:
            self._follow(self._stream, max(self._chain(self._stream), done, key=Chain.total))
            return result

        return join

    def _chain(self, stream: SideStream | None) -> Chain:
        return self._chains.get(stream, Chain())

    def _follow(self, stream: SideStream | None, chain: Chain) -> None:
        self._chains[stream] = chain
        if stream is None:
            self.chains[self.part] = chain

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        result, name = func(*args, **(kwargs or {})), func.overloadpacket.__name__
        is_view = any(returned.alias_info is not None and not returned.alias_info.is_write for returned in func._schema.returns)
        if name in FREE:
            if name.startswith(("empty", "new_empty")):
                result.zero_()
        elif not is_view:
            self.note(f"torch.{name}")
        return result


class StandIn:
    """The group and its process group: rank 0 of `size`, on one host, whose collectives are noted."""

    rank, limits = 0, Limits(start_s=60.0, step_s=60.0)

    def __init__(self, size: int, recorder: Recorder) -> None:
        self.size, self._recorder = size, recorder
        self.seat = Seat(rank=0, size=size, name="decode/0", host="", rendezvous="")

    def backend(self, device: torch.device) -> StandIn:
        return self

    def before_close(self, close: Callable[[], None]) -> None:
        """Nothing is open."""

    def when_lost(self, call: Callable[[], None]) -> None:
        """Nobody is."""

    def working(self, what: str) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def _allgather_base(self, out: torch.Tensor, rows: torch.Tensor) -> StandIn:
        self._recorder.note("all-gather")
        return self

    def _reduce_scatter_base(self, out: torch.Tensor, rows: torch.Tensor) -> StandIn:
        self._recorder.note("reduce-scatter")
        return self

    def wait(self) -> None:
        """It is done."""


def open_exchange(group: Group, shape: ExchangeShape, ops: BoundOps) -> ExpertExchange:
    """As `direct` does where it can."""
    if not shape.is_latency_bound:
        return PaddedGatherExchange(group, shape, ops)
    return DirectExchange(group, shape, [0] * group.size, torch.device("cpu"), GatherExchange(group, shape, ops), None)


def triton_ops() -> BoundOps:
    functions, packs = {}, {}
    for name in OP_NAMES:
        backends = get_op(name).backends
        functions[name], pack = load_backend(get_op(name), "triton" if "triton" in backends else "reference")
        if pack is not None:
            packs[name] = pack
    functions["expert_exchange"] = open_exchange
    return BoundOps(functions, packs, ())


def decode_batch(size: int) -> Batch:
    """As a decode graph holds it."""
    positions = torch.full((size,), PAGES * PAGE_TOKENS - 1)
    table = torch.zeros(size, PAGES, dtype=torch.int32)
    places = TokenPlaces(positions, torch.arange(size), positions, torch.arange(size), table, is_decode=True)
    return Batch(torch.zeros(size, dtype=torch.int64), places, (0,) * size, (1,) * size, PAGES * PAGE_TOKENS, None)


@contextlib.contextmanager
def noting_kernels(recorder: Recorder) -> Iterator[None]:
    def launch(kernel: JITFunction[Any], *args: Any, **kwargs: Any) -> None:
        recorder.note(kernel.__name__)
        recorder.keys.add(key_of(kernel, args, kwargs))

    def start(side: SideStream, work: Callable[[], T], late: bool = False) -> Callable[[], T]:
        return recorder.start(side, work)

    with mock.patch.object(JITFunction, "run", launch), mock.patch.object(SideStream, "start", start):
        yield


def key_of(kernel: JITFunction[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Key:
    special: list[object] = []
    for parameter, value in zip(kernel.params, args, strict=False):
        if isinstance(value, torch.Tensor):
            special.append((value.dtype, value.data_ptr() % 16 == 0))
        elif isinstance(value, int):
            special.append(parameter.do_not_specialize or (value == 1, value % 16 == 0))
    constants = (f"{name}={value}" for name, value in kwargs.items() if name not in ("grid", "warmup"))
    return kernel.__name__, (*special, *sorted(constants))


def small_model(ranks: int, batch: int, recorder: Recorder, is_decode: bool, num_layers: int = 6) -> tuple[DeepseekV4, ModelCaches]:
    """Of rank 0, on the CPU with the Triton backends bound, for up to `batch` sequences of PAGES pages."""
    device = torch.device("cpu")
    with tempfile.TemporaryDirectory() as folder:
        (pathlib.Path(folder) / "config.json").write_text(
            json.dumps(json.loads(SHAPE.read_text()) | SMALL | {"num_hidden_layers": num_layers})
        )
        model = ModelConfig.from_folder(pathlib.Path(folder))
    engine, ops = EngineConfig(device="cpu", load="dummy", max_model_len=PAGES * PAGE_TOKENS), triton_ops()
    group: Any = StandIn(ranks, recorder)
    sharing = Sharing(group=group, max_tokens=batch, is_latency_bound=is_decode)
    share = None if ranks == 1 else ExpertShare.open(sharing, model, ops, device)
    weights = dummy_weights(model, device)
    network = DeepseekV4(model, engine, weights if share is None else weights.only(share.is_wanted), ops, share)
    return network, ModelCaches(Arena(build_layout(model, engine, "launches"), PAGES, batch, device), model)


def count(ranks: int, batch: int) -> tuple[Launches, Launches]:
    """Of one decode step of `batch` sequences: all launches, and those of the longest chain."""
    recorder = Recorder()
    network, caches = small_model(ranks, batch, recorder, is_decode=True)
    model = network._model
    for number, layer in enumerate(network._layers):
        routing = "hash" if number < model.num_hash_layers else "score"
        layer.forward = _in_part(recorder, f"layer of ratio {model.compress_ratios[number]}, {routing}", layer.forward)  # type: ignore[method-assign]
    step = decode_batch(batch)
    with torch.no_grad(), noting_kernels(recorder), recorder:
        for _ in range(2):  # the first one also makes tables that are kept
            recorder.found, recorder.chains = {}, {}
            recorder.begin("before the layers")
            FORWARD(network, step, caches)
    return recorder.found, recorder.chains


def prefill_keys(steps: Sequence[PrefillStep]) -> dict[PrefillStep, set[Key]]:
    """What the kernels of these steps are compiled for."""
    recorder, found = Recorder(), {}
    network, caches = small_model(1, max(map(len, steps)), recorder, is_decode=False, num_layers=3)
    with torch.no_grad(), noting_kernels(recorder):
        for step in steps:
            recorder.keys = set()
            with recorder:
                FORWARD(network, prefill_batch(step), caches)
            found[step] = recorder.keys
    return found


def prefill_batch(step: PrefillStep) -> Batch:
    chunks = []
    for slot_id, (length, end) in enumerate(step):
        request = Request(request_id=str(slot_id), token_ids=(0,) * end, prompt_len=end, sampling=SamplingParams(max_tokens=1))
        sequence = Tokens.from_request(request)
        sequence.slot_id, sequence.page_ids, sequence.num_computed = slot_id, [0] * -(-end // PAGE_TOKENS), end - length
        chunks.append(Chunk(sequence, length))
    return build_batch(chunks)


def launches_of_flash(found: Launches) -> tuple[float, float]:
    """Of all launches or of chains: (those of a layer that multiply no weights, those that do), on average over V4-Flash's layers; two of
    attention, four of hyper-connections and two of the exchange are beside these."""
    config = json.loads(SHAPE.read_text())
    names = [f"layer of ratio {ratio}, {'hash' if number < 3 else 'score'}" for number, ratio in enumerate(config["compress_ratios"][:43])]
    totals, products = (
        sum(sum(number for name, number in found[layer].items() if is_meant(name)) for layer in names) / len(names)
        for is_meant in (lambda name: True, PRODUCTS.__contains__)
    )
    return totals - products - 2 - 4 - (2 if "direct_dispatch_kernel" in found[names[0]] else 0), products


def _in_part(recorder: Recorder, part: str, forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        recorder.begin(part)
        try:
            return forward(*args)
        finally:
            recorder.begin("behind the layers")

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description="Count the launches of a decode step, layer by layer.")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--batch", type=int, default=1)
    arguments = parser.parse_args()
    found, chains = count(arguments.ranks, arguments.batch)
    for part, launches in found.items():
        torch_ones = sum(number for name, number in launches.items() if name.startswith("torch."))
        print(f"{part}: {launches.total()}, of them {torch_ones} of torch, {chains[part].total()} in the longest chain")
        for name, number in launches.most_common():
            print(f"    {number:3} {name}")
    small, products = launches_of_flash(chains)
    software = dataclasses.replace(AS_MEASURED, small_launches=small, products=products)
    parts = decode_parts(work_of("v4_flash"), H200, software, ranks=arguments.ranks, batch=arguments.batch, context=8192)
    print(f"V4-Flash: {sum(parts.values()) * 1e3:.2f} ms", {part: round(seconds * 1e3, 2) for part, seconds in parts.items()})


if __name__ == "__main__":
    main()

"""How much of a decode step a group's ranks wait for each other: with even load, and with one rank idle.

python -m tests.benchmarks.bench_waiting [--ranks 2] [--device cuda] [--model deploy/model_shapes/v4_flash] [--layers N]
    [--batches 32,128] [--context 4096] [--ops OP=BACKEND ...] [--out FILE.json]

A step is the forward pass of a whole batch with dummy weights, on GPUs one replay of its graph; all ranks begin together, then step after
step without a word in between. For each batch a rank, on the slowest rank:

    step          milliseconds of a step
    exchange      of it in the kernels of the exchange, waiting included
    together      the same kernels when nothing lies between them, so that all ranks reach each one together: what sending takes
    waiting       (exchange - together) / step
    one idle      a step while rank 0 has no sequences, on the slowest other rank, over that with even load

On GPUs the exchange is what the profiler sees of its kernels (`direct`, NCCL, DeepEP); on CPUs (`--device cpu`) the time inside its calls.
"""

from __future__ import annotations

import argparse
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from engine.batch import Chunk, build_batch
from engine.config import EngineConfig
from engine.engine import LoadedModel
from engine.graphs import PAGES_STEP, DecodeGraphs
from engine.model.quantized import FP8_BLOCK
from engine.ops.expert_exchange import Arrived, Beside, ExpertExchange, Tokens, nothing
from engine.ops.fp8_linear import quantize_rows
from engine.parallel.experts import ExpertShare, LayerShare, Sharing
from engine.parallel.group import Group, Limits, Seat
from tests.benchmarks.bench_engine import FILLED_TOKENS, cut_shape, fill, new_sequence
from tests.benchmarks.bench_exchange import captured, publish, results_for, run_ranks, slowest_of
from tests.benchmarks.step_profile import kernel_spans

EXCHANGE_KERNELS = ("ncclDevKernel", "deep_ep::", "direct_dispatch", "direct_combine")
REPEATS = 12
PROFILED = 4
"""Steps."""
CPU = torch.device("cpu")

Step = Callable[[], object]


class TimedExchange:
    """An exchange, and the seconds that were spent inside it."""

    def __init__(self, inner: ExpertExchange) -> None:
        self._inner, self.seconds = inner, 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def dispatch(self, *arguments: Any) -> Arrived:
        began = time.perf_counter()
        arrived = self._inner.dispatch(*arguments)
        self.seconds += time.perf_counter() - began
        return arrived

    def combine(self, rows: torch.Tensor, arrived: Arrived, beside: Beside = nothing) -> torch.Tensor:
        began = time.perf_counter()
        total = self._inner.combine(rows, arrived, beside)
        self.seconds += time.perf_counter() - began
        return total


class Bench:
    """One rank with its part of the model."""

    def __init__(self, loaded: LoadedModel, group: Group, batch: int, context: int) -> None:
        assert loaded.share is not None, "a group shares experts"
        self.loaded, self.group, self.share, self.batch = loaded, group, loaded.share, batch
        self.share.begin_step(batch)
        pages = context // 256 + 1
        num_pages = min(batch * pages, 256 + pages)  # sequences share pages; what they hold does not matter
        caches = loaded.new_caches(num_pages, batch)
        fill(loaded, caches)
        sequences = [new_sequence(n, context, [(n * pages + i) % num_pages for i in range(pages)]) for n in range(batch)]
        for sequence in sequences:
            sequence.token_ids[-1] = (sequence.token_ids[-1] + batch * group.rank) % loaded.model.vocab_size
        self._chunks = [Chunk(sequence, 1) for sequence in sequences]
        self._caches, self._graphs = caches, None
        if loaded.device.type == "cuda":
            width = -(-pages // PAGES_STEP) * PAGES_STEP
            self._graphs = DecodeGraphs(loaded.network, caches, [batch], [width])

    def feed(self, token_ids: list[int]) -> None:
        """Other tokens for the next `step`, one a sequence."""
        for chunk, token in zip(self._chunks, token_ids, strict=True):
            chunk.sequence.token_ids[-1] = token

    def step(self, is_idle: bool) -> Step:
        """A decode step; an idle rank's has no sequences."""
        network = self.loaded.network
        if self._graphs is not None:
            return self._graphs.fill([] if is_idle else self._chunks, self.batch)[0].replay
        if is_idle:
            return network.join
        batch = build_batch(self._chunks, self.loaded.device)
        return lambda: network.forward(batch, self._caches)

    def exchanges_alone(self) -> Step:
        """The exchanges of a step, one after the other, of rows like the model's."""
        layers, model = list(self.share.layers.values())[: self.loaded.model.num_hidden_layers], self.loaded.model
        generator = torch.Generator().manual_seed(self.group.rank)
        ids = torch.rand(self.batch, model.n_routed_experts, generator=generator).argsort(1)[:, : model.num_experts_per_tok].contiguous()
        ids, weights = ids.to(self.loaded.device), torch.rand(ids.shape, generator=generator).to(self.loaded.device)
        x = torch.randn(self.batch, model.hidden_size, generator=generator).to(self.loaded.device, torch.bfloat16)
        positions = torch.arange(self.batch, device=x.device)
        quantized = quantize_rows(x) if model.hidden_size % FP8_BLOCK == 0 else None  # at hand, in a model's step
        tokens = Tokens(x, ids, weights, positions, quantized)
        rows = layers[0].dispatch(tokens)
        sums = results_for(rows, model.hidden_size)
        layers[0].exchange.combine(sums, rows)

        def run() -> None:
            for layer in layers:
                layer.exchange.combine(sums, layer.dispatch(tokens))

        return run if self._graphs is None else captured(run, 1)

    def timed(self, step: Step) -> tuple[float, float]:
        """(milliseconds of a step, of the exchange in it); medians over REPEATS in a row, after one that brings the ranks together."""
        self.group.barrier()
        return self._timed_on_cpu(step) if self._graphs is None else self._timed_on_gpu(step)

    def _timed_on_cpu(self, step: Step) -> tuple[float, float]:
        exchange = next(iter(self.share.layers.values())).exchange
        assert isinstance(exchange, TimedExchange), "CPU ranks are timed inside their exchange"
        steps, inside = [], []
        for _ in range(REPEATS + 1):
            began, before = time.perf_counter(), exchange.seconds
            step()
            steps.append((time.perf_counter() - began) * 1e3)
            inside.append((exchange.seconds - before) * 1e3)
        return statistics.median(steps[1:]), statistics.median(inside[1:])

    def _timed_on_gpu(self, step: Step) -> tuple[float, float]:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(REPEATS + 2)]
        for event in events:
            step()
            event.record()
        torch.cuda.synchronize()
        median = statistics.median(start.elapsed_time(end) for start, end in zip(events, events[1:], strict=False))
        return median, self._in_exchange_ms(step)

    def _in_exchange_ms(self, step: Step) -> float:
        """By the profiler, of a step that follows another: the first one brings the ranks together."""

        def run() -> None:
            self.group.barrier()
            for _ in range(PROFILED + 1):
                step()

        spans = [(start, end) for start, end, name in kernel_spans(run) if any(part in name for part in EXCHANGE_KERNELS)]
        return sum(end - start for start, end in spans[len(spans) // (PROFILED + 1) :]) / PROFILED / 1e3


def time_inside(share: ExpertShare) -> None:
    """Have the exchange of all layers timed."""
    layers: list[LayerShare] = list(share.layers.values())
    timed = TimedExchange(layers[0].exchange)
    for layer in layers:
        layer.exchange = timed


def measure(loaded: LoadedModel, group: Group, batches: list[int], context: int) -> Iterator[dict[str, Any]]:
    """Rows, equal on all ranks."""
    for batch in batches:
        bench = Bench(loaded, group, batch, context)
        step_ms, exchange_ms = bench.timed(bench.step(is_idle=False))
        _, together_ms = bench.timed(bench.exchanges_alone())
        idle_ms, _ = bench.timed(bench.step(is_idle=group.rank == 0))
        slowest, waiting = slowest_of(group, step_ms), slowest_of(group, max(0.0, exchange_ms - together_ms) / step_ms)
        busy = slowest_of(group, 0.0 if group.rank == 0 else idle_ms / step_ms)
        yield {
            "ranks": group.size, "batch": batch, "context": context, "step ms": round(slowest, 3),
            "exchange ms": round(slowest_of(group, exchange_ms), 3), "together ms": round(slowest_of(group, together_ms), 3),
            "waiting": f"{waiting:.1%}", "one idle": f"{busy - 1:+.1%}",
        }  # fmt: skip


def work(rank: int, arguments: argparse.Namespace, rendezvous: str) -> None:
    """One rank."""
    if arguments.device == "cuda":
        torch.cuda.set_device(rank)
    seat = Seat(rank=rank, size=arguments.ranks, name="bench/0", host="127.0.0.1", rendezvous=rendezvous)
    group = Group.join(seat, Limits(start_s=600, step_s=90))
    sharing = Sharing(group=group, max_tokens=max([FILLED_TOKENS, *arguments.batches]), is_latency_bound=True)
    ops = dict(pair.split("=") for pair in arguments.ops)
    engine = EngineConfig(device=arguments.device, load="dummy", max_model_len=arguments.context + 256, ops=ops)
    with tempfile.TemporaryDirectory() as folder:
        loaded = LoadedModel.load(cut_shape(arguments.model, arguments.layers, pathlib.Path(folder)), engine, sharing)
    assert loaded.share is not None
    if arguments.device == "cpu":
        time_inside(loaded.share)
    said = {"layers": loaded.model.num_hidden_layers, "ops": {choice.op: choice.backend for choice in loaded.ops.choices}}
    publish(measure(loaded, group, arguments.batches, arguments.context), group, arguments, said)
    group.barrier()
    group.close()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time that ranks of a group wait for each other in a decode step.")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--model", type=pathlib.Path, default=pathlib.Path("deploy/model_shapes/v4_flash"))
    parser.add_argument("--layers", type=int, default=None)
    parser.add_argument("--batches", type=lambda text: [int(part) for part in text.split(",")], default=[32, 128])
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--ops", nargs="*", default=[], metavar="OP=BACKEND")
    parser.add_argument("--out", type=pathlib.Path, default=None)
    return parser.parse_args()


if __name__ == "__main__":
    run_ranks(work, parse())

"""Time the exchange of experts against bare calls of the library below it, in one run: what our part adds.

python -m tests.benchmarks.bench_exchange [--ranks 2] [--device cuda] [--tokens 1,32,128,256] [--prompt-tokens 4096] [--hidden 4096]
    [--experts 256] [--top-k 6] [--out FILE.json]

One row is a dispatch and a combine with nothing in between, of so many tokens a rank, on the slowest rank. Decode (`--tokens`) is timed as
replays of a CUDA graph that holds several, prefill (`--prompt-tokens`) as several calls in a row, so that the host launches one while the
GPU is busy with the one before, as it does in a chunk (who asks the GPU for sizes, as the reference and DeepEP do for prompts, cannot);
the rows of a load take turns. Experts are drawn at random. Beside each backend stands what it calls, with tensors of the same sizes and
formats that were made before: two collectives, or DeepEP's dispatch and combine; `direct`, which calls nothing, stands beside the
collectives. For prompts these send FP8 values, their scales and labels, and bf16 sums back; "wide" are those that send bf16 values and,
of collectives, fp32 sums. What the results are is for tests/parity/test_exchange_gpus.py to say. On CPUs (`--device cpu`) the collectives
are gloo's.

DeepEP in decode, on either side: tokens end in rooms by expert, and results are sent from where experts leave them, DeepEP's own buffer.
`deepep` is that and the choice of copies, with the count of load, before; what lists the rows of rooms for the experts' products is part
of `moe_experts`, as the listing of other rows is, and in no column. "DeepEP, copied" is the bare calls with a combine that fetches
results from a tensor. Up to 20c26b5 `deepep` stood beside that one, and held two launches more, which took rows out of rooms and back.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from engine.config import EngineConfig
from engine.model.quantized import FP8_BLOCK
from engine.ops.exchange_pack_fp8 import row_words
from engine.ops.expert_exchange import Arrived, ExchangeShape, ExpertExchange, Tokens
from engine.ops.expert_exchange.gather import GatherExchange
from engine.ops.fp8_linear import quantize_rows
from engine.ops.moe_experts import Rooms
from engine.ops.registry import bind, get_op, load_backend
from engine.parallel.expert_placement import SlotChoice, even_placement
from engine.parallel.group import Group, Limits, Rendezvous, Seat
from tests.benchmarks.bench_serving import table
from tests.benchmarks.command_line import command, commit, ints

CALLS = 16
"""In one graph."""
PROMPT_CALLS = 8
"""In a row."""
WARM_UP = 5
REPEATS = 15


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """What every rank sends."""

    tokens: int
    hidden: int
    experts: int
    top_k: int
    is_decode: bool

    def shape(self, group: Group, max_tokens: int) -> ExchangeShape:
        slots = -(-self.experts // group.size) * group.size
        return ExchangeShape(hidden_size=self.hidden, num_slots=slots, max_tokens=max_tokens, is_latency_bound=self.is_decode)

    def draw(self, rank: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x bf16 [T, d], expert ids int64 [T, k], weights fp32 [T, k]."""
        generator = torch.Generator().manual_seed(rank)
        x = torch.randn(self.tokens, self.hidden, generator=generator).bfloat16()
        ids = torch.rand(self.tokens, self.experts, generator=generator).argsort(1)[:, : self.top_k].contiguous()
        return x.to(device), ids.to(device), torch.rand(self.tokens, self.top_k, generator=generator).to(device)


def ours(exchange: ExpertExchange, load: Load, group: Group, device: torch.device) -> Callable[[], object]:
    x, ids, weights = load.draw(group.rank, device)
    positions = torch.arange(load.tokens, device=device)
    choice = SlotChoice(even_placement(load.experts, group.size), group.rank, device)
    exchange.rows = load.tokens
    quantized = quantize_rows(x) if load.is_decode and load.hidden % FP8_BLOCK == 0 else None  # at hand, in a model's step
    tokens = Tokens(x, ids, weights, positions, quantized)
    first = exchange.dispatch(tokens, choice)
    rows = results_for(first, load.hidden)
    exchange.combine(rows, first)
    return lambda: exchange.combine(rows, exchange.dispatch(tokens, choice))


def results_for(arrived: Arrived, hidden: int) -> torch.Tensor:
    """In place of what experts make of `arrived`; of rows in rooms where their results would lie, which is the same place each time."""
    if isinstance(arrived.x, Rooms):
        return arrived.x.out
    assert arrived.ids is not None
    if arrived.sum_dtype is None:
        return torch.ones(*arrived.ids.shape, hidden, dtype=torch.bfloat16, device=arrived.ids.device)
    return torch.ones(len(arrived.ids), hidden, dtype=arrived.sum_dtype, device=arrived.ids.device)


def bare_collectives(load: Load, group: Group, device: torch.device, is_wide: bool) -> Callable[[], object]:
    """What `gather` sends: tokens with their labels to all ranks, float32 sums back (wide: of decode steps); of prompts tokens in FP8, and
    sums to be added in bf16."""
    backend, size = group.backend(device), group.size
    width = 2 * load.hidden + 8 * load.top_k if is_wide else 4 * row_words(load.hidden, load.top_k)
    sent = torch.zeros(load.tokens, width, dtype=torch.uint8, device=device)
    got = torch.empty(size * load.tokens, width, dtype=torch.uint8, device=device)
    rows = torch.zeros(size, load.tokens, load.hidden, device=device, dtype=torch.float32 if is_wide else torch.bfloat16)
    sums = torch.empty_like(rows[0] if is_wide else rows)

    def call() -> None:
        backend._allgather_base(got, sent).wait()
        if is_wide:
            backend._reduce_scatter_base(sums, rows.flatten(0, 1)).wait()
        else:
            group.swap(rows.unbind(), sums.unbind())()

    return call


def bare_normal(exchange: Any, load: Load, group: Group, device: torch.device, is_wide: bool) -> Callable[[], object]:
    """DeepEP for prompts, with the buffer of `exchange`: a process has one NVSHMEM. Wide: in bf16."""
    buffer = exchange._buffer
    x, ids, weights = load.draw(group.rank, device)
    per_rank, _, per_expert, is_in_rank, _ = buffer.get_dispatch_layout(ids, exchange._num_slots)
    layout = {"num_tokens_per_rank": per_rank, "is_token_in_rank": is_in_rank, "num_tokens_per_expert": per_expert}
    quantized = quantize_rows(x)
    sent = x if is_wide else (quantized.codes, quantized.scale.contiguous())
    _, places, _, _, handle, _ = buffer.dispatch(sent, **layout, topk_idx=ids, topk_weights=weights)
    rows = torch.ones(len(places), load.hidden, dtype=torch.bfloat16, device=device)
    buffer.combine(rows, handle)

    def call() -> None:
        buffer.get_dispatch_layout(ids, exchange._num_slots)
        buffer.combine(rows, buffer.dispatch(sent, **layout, topk_idx=ids, topk_weights=weights)[4])

    return call


def bare_low_latency(exchange: Any, load: Load, group: Group, device: torch.device, is_copied: bool) -> Callable[[], object]:
    """DeepEP in decode, with the buffer of `exchange`. `is_copied`: the combine fetches results from a tensor; else they lie where it sends
    from, as the adapter has them."""
    buffer = exchange._buffer
    x, ids, weights = load.draw(group.rank, device)
    rows = torch.zeros(exchange._experts, exchange._max_tokens * group.size, load.hidden, dtype=torch.bfloat16, device=device)

    def call() -> None:
        handle = buffer.low_latency_dispatch(x, ids, exchange._max_tokens, exchange._num_slots, use_fp8=True, round_scale=True)[2]
        buffer.low_latency_combine(rows, ids, weights, handle, zero_copy=not is_copied)

    return call


class Exchanges:
    """One of each backend and mode, opened when first asked for, with room for the largest load: DeepEP's are not opened twice."""

    def __init__(self, loads: list[Load], group: Group, device: torch.device) -> None:
        self._loads, self._group, self._op = loads, group, get_op("expert_exchange")
        self._ops = bind(EngineConfig(device=device.type), device)
        self._opened: dict[tuple[str, bool], ExpertExchange] = {}
        self.no_deepep = self._op.backends["deepep"].requires(device)
        self.no_direct = self._op.backends["direct"].requires(device)
        if self.no_direct is None and isinstance(self.of("direct", max(loads, key=lambda load: load.is_decode)), GatherExchange):
            self.no_direct = "the ranks cannot reach each other's memory"

    def of(self, backend: str, load: Load) -> ExpertExchange:
        key = (backend, load.is_decode)
        if key not in self._opened:
            most = max(one.tokens for one in self._loads if one.is_decode == load.is_decode)
            self._opened[key] = load_backend(self._op, backend)[0](self._group, load.shape(self._group, most), self._ops)
        return self._opened[key]

    def close(self) -> None:
        for exchange in self._opened.values():
            exchange.close()


def bodies(
    load: Load, exchanges: Exchanges, group: Group, device: torch.device
) -> Iterator[tuple[str, str, Callable[[], Callable[[], object]]]]:
    """(name, the name of what it is compared with, what makes a call to time). Every rank in the same order."""
    yield "collectives", "", lambda: bare_collectives(load, group, device, load.is_decode)
    if not load.is_decode:
        yield "collectives, wide", "", lambda: bare_collectives(load, group, device, True)
    yield "gather", "collectives", lambda: ours(exchanges.of("gather", load), load, group, device)
    if exchanges.no_direct is None and load.is_decode:
        yield "direct", "collectives", lambda: ours(exchanges.of("direct", load), load, group, device)
    if device.type == "cpu" or not load.is_decode:  # the reference asks the host for sizes, which a graph cannot
        yield "reference", "collectives", lambda: ours(exchanges.of("reference", load), load, group, device)
    if exchanges.no_deepep is None:
        bare, other = (bare_low_latency, "DeepEP, copied") if load.is_decode else (bare_normal, "DeepEP, wide")
        yield "DeepEP", "", lambda: bare(exchanges.of("deepep", load), load, group, device, False)
        yield other, "", lambda: bare(exchanges.of("deepep", load), load, group, device, True)
        yield "deepep", "DeepEP", lambda: ours(exchanges.of("deepep", load), load, group, device)


def measure(loads: list[Load], group: Group, device: torch.device) -> Iterator[dict[str, Any]]:
    """Rows, equal on all ranks."""
    exchanges = Exchanges(loads, group, device)
    if exchanges.no_deepep is not None and group.rank == 0:
        print(f"deepep is left out: {exchanges.no_deepep}", flush=True)
    if exchanges.no_direct is not None and group.rank == 0:
        print(f"direct is left out: {exchanges.no_direct}", flush=True)
    for load in loads:
        found = list(bodies(load, exchanges, group, device))
        parts = 1 if device.type == "cpu" else CALLS if load.is_decode else PROMPT_CALLS
        several = captured if load.is_decode and device.type == "cuda" else in_a_row
        times = timed([several(make(), parts) for _, _, make in found], group, device, parts)
        slowest = {name: slowest_of(group, statistics.median(one)) for (name, _, _), one in zip(found, times, strict=True)}
        for name, base, _ in found:
            yield {
                "mode": "decode" if load.is_decode else "prefill", "tokens a rank": load.tokens, "ranks": group.size, "what": name,
                "us": round(slowest[name], 1), "beside": base or "-", "added": f"{slowest[name] / slowest[base] - 1:+.1%}" if base else "-",
            }  # fmt: skip
    exchanges.close()


def in_a_row(call: Callable[[], object], times: int) -> Callable[[], object]:
    def run() -> None:
        for _ in range(times):
            call()

    return run


def captured(call: Callable[[], object], times: int) -> Callable[[], object]:
    """A replay of so many calls, which holds the tensors of `call`: the graph reads them, and does not."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        for _ in range(times):
            call()

    def replay(held: Callable[[], object] = call) -> None:
        graph.replay()

    return replay


def timed(calls: list[Callable[[], object]], group: Group, device: torch.device, parts: int) -> list[list[float]]:
    """Microseconds of one of the `parts` of each call, REPEATS times. The calls take turns, so that none has the GPU while it is still
    slow; each begins on all ranks at once."""
    times: list[list[float]] = [[] for _ in calls]
    for turn in range(WARM_UP + REPEATS):
        for call, found in zip(calls, times, strict=True):
            group.barrier()
            call()  # brings the ranks together on the device
            us = _time_on_cpu(call) if device.type == "cpu" else _time_on_gpu(call)
            if turn >= WARM_UP:
                found.append(us / parts)
    return times


def _time_on_gpu(call: Callable[[], object]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3


def _time_on_cpu(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return (time.perf_counter() - began) * 1e6


def slowest_of(group: Group, value: float) -> float:
    most = torch.tensor(value, dtype=torch.float64)
    with group.working("the collection of times"):
        group.backend(most.device).allreduce([most], torch.distributed.ReduceOp.MAX).wait()
    return float(most)


def publish(measured: Iterable[dict[str, Any]], group: Group, arguments: argparse.Namespace, said: dict[str, Any]) -> None:
    """All ranks measure row after row; rank 0 prints each as it comes, keeps `arguments.out` up to date with those so far and what is
    `said` of them, and prints a table at the end."""
    rows = []
    for row in measured:
        rows.append(row)
        if group.rank == 0:
            print(row, flush=True)
            if arguments.out is not None:
                name = torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu"
                header = {"command": command(), "commit": commit(), "device": name}
                arguments.out.write_text(json.dumps(header | said | {"rows": rows}, indent=1) + "\n")
    if group.rank == 0:
        print(table(rows), flush=True)


def run_ranks(work: Callable[[int, argparse.Namespace, str], None], arguments: argparse.Namespace) -> None:
    """`work(rank, arguments, address of the rendezvous)` in a process for each of `arguments.ranks`."""
    rendezvous = Rendezvous("127.0.0.1")
    torch.multiprocessing.spawn(work, (arguments, rendezvous.address), nprocs=arguments.ranks)


def work(rank: int, arguments: argparse.Namespace, rendezvous: str) -> None:
    """One rank."""
    device = torch.device(arguments.device, rank) if arguments.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.set_num_threads(1)
    seat = Seat(rank=rank, size=arguments.ranks, name="bench/0", host="127.0.0.1", rendezvous=rendezvous)
    group = Group.join(seat, Limits(start_s=120, step_s=30))
    sizes = {"hidden": arguments.hidden, "experts": arguments.experts, "top_k": arguments.top_k}
    loads = [Load(tokens=tokens, is_decode=True, **sizes) for tokens in arguments.tokens]
    loads += [Load(tokens=tokens, is_decode=False, **sizes) for tokens in arguments.prompt_tokens]
    publish(measure(loads, group, device), group, arguments, {"options": sizes})
    group.barrier()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time the exchange of experts against bare calls.")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tokens", type=ints, default=[1, 32, 128, 256], help="of each rank in a decode step")
    parser.add_argument("--prompt-tokens", type=ints, default=[4096], help="of each rank in a prefill step")
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--top-k", type=int, default=6)
    parser.add_argument("--out", type=pathlib.Path, default=None)
    return parser.parse_args()


if __name__ == "__main__":
    run_ranks(work, parse())

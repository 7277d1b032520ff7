"""What a group whose ranks have unequal loads gains when experts move, and what its steps take while they do.

python -m tests.benchmarks.bench_moves [--ranks 2] [--device cuda] [--model deploy/model_shapes/v4_flash] [--layers N]
    [--skew 1.0] [--together 16] [--batches 32,128] [--context 4096] [--prompts 8192] [--widened-layers N] [--steps N]
    [--settle-s 60] [--ops OP=BACKEND ...] [--out FILE.json]

Dummy weights, experts chosen by token id in all layers: the n-th most popular has weight n^-SKEW, and the TOGETHER most popular
of each layer lie on rank 0 at the start (0: anywhere, as drawn; over two ranks chance alone leaves 1.18 at skew 1, by bench_balance).
Token ids are drawn, each as likely. `--batches`: decode steps of so many rows a rank; `--prompts`: a group for prompts in their
place, a chunk of so many tokens a rank. Ranks agree on each step, count, plan and move as those that serve do (GroupSteps,
ExpertShare, Rebalancer). A step is the forward pass, sampling aside, on GPUs in decode one replay of its graph, launched before
the one before it has ended.

    before experts move, again    each load, the second time with the same tokens: what differs is luck
    while they move               the last load, from the first step with a plan to the one with the last move, SETTLE_S at most
    after                         each load, with the tokens of the first time

Milliseconds of a step on the slowest rank (median, mean, worst), tokens/s a GPU by the mean; rows of the busiest rank over the
mean, from the counted tokens, as the mean of all layers and as the largest; layers and experts (of all ranks) that have moved.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, Protocol

import torch

from core.clock import SystemClock
from core.errors import InternalError
from engine.batch import Chunk, build_batch
from engine.config import EngineConfig
from engine.engine import LoadedModel
from engine.memory_plan import tensor_bytes
from engine.parallel.expert_placement import imbalance
from engine.parallel.experts import Sharing
from engine.parallel.group import Group, Limits, Seat
from engine.parallel.lockstep import GroupSteps
from engine.parallel.rebalance import new_rebalancer
from engine.widening import widen_outputs
from tests.benchmarks.bench_engine import FILLED_TOKENS, cut_shape, new_sequence
from tests.benchmarks.bench_exchange import publish, run_ranks, slowest_of
from tests.benchmarks.bench_waiting import Bench
from tests.benchmarks.command_line import ints
from tests.benchmarks.timeline_parts import visible_gpu

BEFORE, AGAIN, MOVING, AFTER = "before experts move", "again", "while they move", "after"
WARM_UP = 3
"""Steps of a load that are not timed; new placements have kernels of their own."""


class Load(Protocol):
    name: str
    tokens: int
    """Of each rank in a step."""
    leads: bool
    """Whether a step is launched before the one before it has ended."""
    steps: int
    """To be timed, unless the caller says how many."""

    def launch(self, token_ids: list[int]) -> object: ...


class DecodeLoad:
    steps = 40

    def __init__(self, loaded: LoadedModel, group: Group, batch: int, context: int) -> None:
        self.name, self.tokens, self.leads = f"decode, {batch} rows, context {context}", batch, loaded.device.type == "cuda"
        self._bench = Bench(loaded, group, batch, context)

    def launch(self, token_ids: list[int]) -> object:
        self._bench.feed(token_ids)
        return self._bench.step(is_idle=False)()


class PromptLoad:
    leads, steps = False, 6

    def __init__(self, loaded: LoadedModel, prompt: int) -> None:
        self.name, self.tokens = f"prefill, {prompt} tokens", prompt
        self._loaded, self._pages = loaded, list(range(-(-prompt // 256)))
        self._caches = loaded.new_caches(len(self._pages), 2)

    def launch(self, token_ids: list[int]) -> object:
        sequence = new_sequence(0, self.tokens - 1, self._pages)
        sequence.token_ids, sequence.num_computed = token_ids, 0
        self._caches.clear_slot(0)
        return self._loaded.network.forward(build_batch([Chunk(sequence, self.tokens)], self._loaded.device), self._caches)


class MovingRank:
    """A rank that takes steps with its peers. Collective, but for `close`."""

    def __init__(self, loaded: LoadedModel, group: Group) -> None:
        assert loaded.share is not None, "a group shares experts"
        self._loaded, self._group, self._share, self._troubles = loaded, group, loaded.share, list[str]()
        self._woken = threading.Event()
        self._steps = GroupSteps(group, max, SystemClock())
        self._steps.start(self._woken.set, self._troubles.append)
        self._share.forget_load()
        rebalancer = new_rebalancer(loaded, group, self._steps, self._troubles.append)
        assert rebalancer is not None, "engine.rebalance_interval_s is 0"
        self._rebalancer = rebalancer

    def close(self) -> None:
        self._rebalancer.close()
        self._group.barrier()
        self._steps.close()

    def measure(self, loads: list[Load], num_steps: int | None, settle_s: float) -> Iterator[dict[str, Any]]:
        """Rows, equal on all ranks."""
        for stage in (BEFORE, AGAIN, MOVING, AFTER):
            if stage == MOVING:
                yield self._row(stage, loads[-1], lambda: self._while_moving(loads[-1], settle_s))
                continue
            for load in loads:
                yield self._row(stage, load, partial(self._timed, load, num_steps or load.steps))

    def _timed(self, load: Load, num_steps: int) -> list[float]:
        return list(self._take(load, range(WARM_UP + num_steps)))[WARM_UP:]

    def _row(self, stage: str, load: Load, run: Callable[[], list[float]]) -> dict[str, Any]:
        counted, held = self._share.load(), [layer.held for layer in self._share.layers.values()]
        ms = run()
        moved = [sum(map(int.__ne__, old, layer.held)) for old, layer in zip(held, self._share.layers.values(), strict=True)]
        loads, all_moved = self._summed(self._share.load() - counted).tolist(), self._summed(torch.tensor(moved)).tolist()
        by_layer = [imbalance(one, layer.placement) for one, layer in zip(loads, self._share.layers.values(), strict=True)]
        mean, has_moved = slowest_of(self._group, statistics.fmean(ms)), any(all_moved)
        return {
            "stage": stage, "load": load.name, "steps": int(slowest_of(self._group, len(ms))),
            "step ms": round(slowest_of(self._group, statistics.median(ms)), 3), "mean ms": round(mean, 3),
            "worst ms": round(slowest_of(self._group, max(ms)), 1), "tokens/s a GPU": round(load.tokens * 1e3 / mean, 1),
            "imbalance": "-" if has_moved else f"{statistics.fmean(by_layer):.3f}",
            "largest": "-" if has_moved else f"{max(by_layer):.3f}",
            "layers moved": sum(map(bool, all_moved)), "experts": sum(all_moved),
            "seconds": round(slowest_of(self._group, sum(ms)) / 1e3, 2),
        }  # fmt: skip

    def _summed(self, counts: torch.Tensor) -> torch.Tensor:
        with self._group.working("the collection of counts"):
            self._group.backend(counts.device).allreduce([counts]).wait()
        return counts

    def _while_moving(self, load: Load, settle_s: float) -> list[float]:
        """Milliseconds of the steps in which experts moved; of all, if none did."""
        ms, moving = list[float](), list[int]()
        number, block, moved, end = 1 << 20, 16 if load.leads else 4, 0, time.monotonic() + settle_s
        self._rebalancer.start()
        is_over = False
        while not is_over:
            for one in self._take(load, range(number, number + block)):
                ms.append(one)
                moved, before = sum(layer.num_moves for layer in self._share.layers.values()), moved
                if self._share.num_awaited or moved > before:
                    moving.append(len(ms))
            number += block
            is_settled = (moved > 0 and self._share.num_awaited == 0) or time.monotonic() > end
            is_over = slowest_of(self._group, float(not is_settled)) == 0
        self._rebalancer.close()
        return ms[moving[0] - 1 : moving[-1]] if moving else ms

    def _take(self, load: Load, numbers: Iterable[int]) -> Iterator[float]:
        """Milliseconds of each step, from the end of the one before it to its own. `numbers` say which tokens they have."""
        drawn = [self._drawn(number, load.tokens) for number in numbers]
        self._group.barrier()
        before: Callable[[], None] | None = None
        last = time.perf_counter()
        for place, token_ids in enumerate(drawn):
            self._agree(load.tokens)
            load.launch(token_ids)
            now = mark(self._loaded.device)
            waits = [one for one in (before, None if load.leads and place + 1 < len(drawn) else now) if one is not None]
            before = now if load.leads else None
            for wait in waits:
                wait()
                last, began = time.perf_counter(), last
                yield (last - began) * 1e3

    def _drawn(self, number: int, tokens: int) -> list[int]:
        generator = torch.Generator().manual_seed(number * self._group.size + self._group.rank)
        found: list[int] = torch.randint(self._loaded.model.vocab_size, (tokens,), generator=generator).tolist()
        return found

    def _agree(self, tokens: int) -> None:
        while self._steps.agreed(tokens) is None:
            if self._troubles:
                raise InternalError(self._troubles[0])
            self._woken.wait(1.0)
            self._woken.clear()
        self._steps.begin(tokens)
        self._share.begin_step(tokens)


def mark(device: torch.device) -> Callable[[], None]:
    """A function that waits until all is done that was launched before."""
    if device.type == "cpu":
        return lambda: None
    event = torch.cuda.Event()
    event.record()
    return event.synchronize


def gather_popular(loaded: LoadedModel, number: int) -> None:
    """Give the `number` most popular experts of each layer the first ids, which rank 0 holds at the start, and the others those after."""
    for layer in loaded.network._layers:
        table = layer.moe._table
        assert table is not None, "experts are chosen by token id"
        popularity = torch.bincount(table.flatten(), minlength=loaded.model.n_routed_experts)
        popularity[popularity.argsort(descending=True)[number:]] = 0  # these stay in their order
        ids = torch.empty_like(popularity)
        ids[popularity.argsort(descending=True, stable=True)] = torch.arange(len(ids), device=ids.device)
        table.copy_(ids[table])


def work(rank: int, arguments: argparse.Namespace, rendezvous: str) -> None:
    """One rank. It sees one GPU, as under Ray: experts are read by a thread that uses the first it sees."""
    if arguments.device == "cuda":
        os.environ["CUDA_VISIBLE_DEVICES"] = visible_gpu(f"cuda:{rank}")
    seat = Seat(rank=rank, size=arguments.ranks, name="bench/0", host="127.0.0.1", rendezvous=rendezvous)
    group = Group.join(seat, Limits(start_s=600, step_s=90))
    batches, prompts = ([], arguments.prompts) if arguments.prompts else (arguments.batches, [])
    sharing = Sharing(group=group, max_tokens=max([FILLED_TOKENS, *batches, *prompts]), is_latency_bound=not prompts)
    engine = EngineConfig(
        device=arguments.device, load="dummy", dummy_skew=arguments.skew, max_model_len=max([arguments.context, *prompts]) + 256,
        rebalance_interval_s=arguments.interval_s, ops=dict(pair.split("=") for pair in arguments.ops),
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        loaded = LoadedModel.load(cut_shape(arguments.model, arguments.layers, pathlib.Path(folder)), engine, sharing)
    gather_popular(loaded, arguments.together)
    loaded.network.widen(arguments.widened_layers)
    if batches:
        widen_outputs(loaded, max(batches), num_pages=0, num_slots=max(batches), workspace_bytes=0)  # as a rank does
    loads: list[Load] = [DecodeLoad(loaded, group, batch, arguments.context) for batch in batches]
    loads += [PromptLoad(loaded, prompt) for prompt in prompts]
    one = MovingRank(loaded, group)
    said = {
        "layers": loaded.model.num_hidden_layers, "skew": arguments.skew, "together": arguments.together,
        "widened layers": loaded.network.num_widened, "weights GB": round(tensor_bytes(loaded.network) / 1e9, 2),
        "ops": {choice.op: choice.backend for choice in loaded.ops.choices},
    }  # fmt: skip
    publish(one.measure(loads, arguments.steps, arguments.settle_s), group, arguments, said)
    one.close()
    group.close()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time steps of a group with unequal loads before, while and after experts move.")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--model", type=pathlib.Path, default=pathlib.Path("deploy/model_shapes/v4_flash"))
    parser.add_argument("--layers", type=int, default=None)
    parser.add_argument("--skew", type=float, default=1.0, help="as bench_balance")
    parser.add_argument("--together", type=int, default=16, help="of the most popular experts, on rank 0 at the start")
    parser.add_argument("--batches", type=ints, default=[32, 128])
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--prompts", type=ints, default=[], help="in place of --batches")
    parser.add_argument("--widened-layers", type=int, default=0, help="with experts as FP8 in place of MXFP4 (prefill.widened_layers)")
    parser.add_argument("--steps", type=int, default=None, help="of each load and stage; 40 in decode, 6 in prefill")
    parser.add_argument("--interval-s", type=float, default=1.5, help="engine.rebalance_interval_s")
    parser.add_argument("--settle-s", type=float, default=60.0, help="for experts to move in")
    parser.add_argument("--ops", nargs="*", default=[], metavar="OP=BACKEND")
    parser.add_argument("--out", type=pathlib.Path, default=None)
    return parser.parse_args()


if __name__ == "__main__":
    run_ranks(work, parse())

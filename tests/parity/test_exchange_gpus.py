"""Every backend of the exchange on two GPUs or four, one process each: the sums of one rank with all experts, as calls
and as a CUDA graph."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

from engine.config import EngineConfig
from engine.model.quantized import QuantizedWeight, quantize_mxfp4
from engine.ops.expert_exchange import ExchangeShape, Tokens
from engine.ops.registry import bind, get_op, load_backend
from engine.parallel.expert_placement import SlotChoice, even_placement
from engine.parallel.group import Group, Limits, Rendezvous, Seat

pytestmark = [pytest.mark.gpu, pytest.mark.multi_gpu]

HIDDEN, INNER, EXPERTS, TOP_K, LIMIT = 4096, 256, 16, 6, 10.0
MAX_TOKENS, TURNS = 64, 3
DRIFT = 0.05
"""Of the norm of all sums: what rounding to FP8 after another order of weight and sum may do (moe_experts/cases.py, deepep.py)."""

Case = tuple[str, bool, tuple[int, ...]]
"""(backend, is_decode, tokens of each rank)."""

CASES: dict[str, list[Case]] = {
    "gather, direct and reference on two": [
        *((backend, True, counts) for backend in ("gather", "direct") for counts in ((16, 16), (1, 1), (64, 64))),
        *((backend, False, counts) for backend in ("gather", "reference") for counts in ((16, 16), (0, 33), (1, 64))),
    ],
    "gather and direct on four": [(backend, True, (16,) * 4) for backend in ("gather", "direct")],
    "deepep on two": [
        *(("deepep", True, counts) for counts in ((16, 16), (1, 1), (64, 64), (0, 5))),
        *(("deepep", False, counts) for counts in ((16, 16), (0, 33), (1, 64))),
    ],
}
"""Each has processes of its own."""


def weights_of(experts: tuple[int, ...], device: torch.device) -> list[list[QuantizedWeight]]:
    def draw(expert: int, which: int, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(100 * expert + which)) / shape[-1] ** 0.5

    shapes = ((INNER, HIDDEN), (HIDDEN, INNER), (INNER, HIDDEN))
    return [[quantize_mxfp4(draw(expert, which, *shape)).to(device) for expert in experts] for which, shape in enumerate(shapes)]


def tokens_of(rank: int, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(count, HIDDEN, generator=generator).bfloat16()
    ids = torch.rand(count, EXPERTS, generator=generator).argsort(1)[:, :TOP_K].contiguous()
    return x, ids, torch.rand(count, TOP_K, generator=generator)


def work(rank: int, rendezvous: str, cases: list[Case]) -> None:
    """A rank's process. It sees its own GPU alone, as under Ray."""
    size = len(cases[0][2])
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(size)))).split(",")
    os.environ["CUDA_VISIBLE_DEVICES"] = visible[rank]
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    group = Group.join(Seat(rank=rank, size=size, name="t/0", host="127.0.0.1", rendezvous=rendezvous), Limits(start_s=60, step_s=30))
    ops, opened = bind(EngineConfig(device="cuda"), device), {}
    choice = SlotChoice(even_placement(EXPERTS, size), rank, device)
    run_experts, pack_experts = load_backend(get_op("moe_experts"), "triton")
    assert pack_experts is not None
    here = pack_experts(*weights_of(even_placement(EXPERTS, size).local(rank), device), True)
    everything = pack_experts(*weights_of(tuple(range(EXPERTS)), device), True)
    for backend, is_decode, counts in cases:
        key = (backend, is_decode)
        if key not in opened:
            shape = ExchangeShape(hidden_size=HIDDEN, num_slots=EXPERTS, max_tokens=MAX_TOKENS, is_latency_bound=is_decode)
            opened[key] = load_backend(get_op("expert_exchange"), backend)[0](group, shape, ops)
        exchange = opened[key]
        exchange.rows = max(counts)
        for turn in range(TURNS):  # buffers are used again
            x, ids, weights = (part.to(device) for part in tokens_of(rank + 10 * turn, counts[rank]))

            def step(
                exchange: Any = exchange, x: torch.Tensor = x, ids: torch.Tensor = ids, weights: torch.Tensor = weights
            ) -> torch.Tensor:
                arrived = exchange.dispatch(Tokens(x, ids, weights, torch.arange(len(x), device=device), None), choice)
                rows = run_experts(arrived.x, arrived.ids, arrived.weights, here, LIMIT, arrived.sum_dtype)
                return exchange.combine(rows, arrived)  # type: ignore[no-any-return]

            alone = run_experts(x, ids, weights, everything, LIMIT) if len(x) else x.float()
            for name, routed in (("called", step()), ("replayed", replayed(step) if is_decode else step())):
                assert routed.shape == alone.shape and routed.dtype == (torch.bfloat16 if backend == "deepep" else torch.float32)
                error = float((routed - alone).norm() / alone.norm().clamp(min=1e-30))
                assert error <= DRIFT, f"{backend} {counts} {name}, rank {rank}, turn {turn}: {error:.3g}"
    for exchange in opened.values():
        exchange.close()
    group.close()


def replayed(step: Callable[[], torch.Tensor]) -> torch.Tensor:
    """From a CUDA graph, at its second replay. All ranks capture, as they do at their start."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        out = step()
    graph.replay()
    graph.replay()
    torch.cuda.synchronize()
    return out


@pytest.mark.parametrize("cases", CASES.values(), ids=CASES.keys())
def test_backends_give_the_sums_of_one_rank(cases: list[Case]) -> None:
    backends = {backend for backend, _, _ in cases if backend != "reference"}
    for backend in sorted(backends):
        if reason := get_op("expert_exchange").backends[backend].requires(torch.device("cuda", 0)):
            pytest.skip(reason)
    if torch.cuda.device_count() < len(cases[0][2]):
        pytest.skip(f"needs {len(cases[0][2])} GPUs")
    rendezvous = Rendezvous("127.0.0.1")
    torch.multiprocessing.spawn(work, (rendezvous.address, cases), nprocs=len(cases[0][2]))

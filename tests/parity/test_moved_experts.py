"""An expert that moves in while a group serves: its packed form takes another's place under a captured graph."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from engine.config import EngineConfig
from engine.model.quantized import Weight, quantize_mxfp4
from engine.ops.registry import bind
from engine.parallel.packed import check_expert, put_expert

pytestmark = pytest.mark.gpu

HIDDEN, INNER, LIMIT = 512, 256, 10.0


@pytest.mark.parametrize("is_wide", [False, True])
def test_a_captured_graph_computes_with_an_expert_that_has_moved_in(is_wide: bool) -> None:
    device = torch.device("cuda")
    ops = bind(dataclasses.replace(EngineConfig(device="cuda"), ops={"moe_experts": "triton"}), device)

    def packed(experts: tuple[int, ...]) -> object:
        def draw(expert: int, which: int, *shape: int) -> Weight:
            values = torch.randn(shape, generator=torch.Generator().manual_seed(10 * expert + which)) / shape[-1] ** 0.5
            return quantize_mxfp4(values).to(device)

        shapes = ((INNER, HIDDEN), (HIDDEN, INNER), (INNER, HIDDEN))
        found = ops.pack["moe_experts"](*([draw(e, which, *shape) for e in experts] for which, shape in enumerate(shapes)), True)
        return ops.widen["moe_experts"](found) if is_wide else found

    generator = torch.Generator().manual_seed(1)
    x = torch.randn(8, HIDDEN, generator=generator).bfloat16().to(device)
    ids = torch.rand(8, 4, generator=generator).argsort(1)[:, :2].contiguous().to(device)
    weights = torch.rand(8, 2, generator=generator).to(device)
    held, one, expected = packed((0, 1, 2, 3)), packed((7,)), packed((0, 1, 7, 3))
    assert (ids == 2).any()

    ops.moe_experts(x, ids, weights, held, LIMIT)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.moe_experts(x, ids, weights, held, LIMIT)
    graph.replay()
    before = out.clone()
    check_expert(held, one)
    put_expert(held, 2, one)
    graph.replay()
    assert torch.equal(out, ops.moe_experts(x, ids, weights, expected, LIMIT)) and not torch.equal(out, before)

"""The adapter to DeepEP against a stand-in with its documented shapes: the reference's sums, within the rounding of bf16."""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Iterator

import pytest
import torch

from core.errors import ConfigError
from engine.ops.expert_exchange import ExchangeShape, Tokens
from engine.ops.moe_experts import Rooms, moe_experts
from engine.parallel.expert_placement import ExpertPlacement, SlotChoice, even_placement
from engine.parallel.group import Group, Limits
from tests.support.experts import EXPERTS, HIDDEN, LIMIT, SKEWED, TOP_K, packed, positions_of, reference_ops, tokens_of
from tests.support.fake_deep_ep import FakeDeepEP
from tests.support.ranks import run_group


@pytest.mark.parametrize("is_latency_bound", [False, True], ids=["normal", "low latency"])
@pytest.mark.parametrize(
    ("placement", "counts"),
    [(even_placement(8, 2), (7, 16)), (even_placement(8, 4), (3, 0, 9, 1)), (even_placement(8, 2), (0, 0)), (SKEWED, (5, 2, 0, 16))],
    ids=str,
)
def test_a_group_gives_the_sums_of_one_rank(
    placement: ExpertPlacement, counts: tuple[int, ...], is_latency_bound: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "deep_ep", FakeDeepEP(len(counts)).module())
    monkeypatch.delitem(sys.modules, "engine.ops.expert_exchange.deepep", raising=False)
    monkeypatch.setenv("NVSHMEM_QP_DEPTH", "0")  # the adapter sets it; this takes it back
    deepep = importlib.import_module("engine.ops.expert_exchange.deepep")
    monkeypatch.setattr(deepep, "HIDDEN_SIZES", (HIDDEN,))
    shape = ExchangeShape(hidden_size=HIDDEN, num_slots=len(placement.experts), max_tokens=17, is_latency_bound=is_latency_bound)

    def rank(group: Group) -> list[torch.Tensor]:
        exchange = deepep.run(group, shape, reference_ops())
        exchange.rows = max(counts)
        sums = []
        for turn in range(2):  # buffers are used again
            x, ids, weights = tokens_of(group.rank + 10 * turn, counts[group.rank], torch.bfloat16)
            arrived = exchange.dispatch(Tokens(x, ids, weights, positions_of(x), None), SlotChoice(placement, group.rank))
            assert isinstance(arrived.x, Rooms) == is_latency_bound
            if isinstance(arrived.x, Rooms):
                assert arrived.x.counts.sum() <= arrived.x.most <= max(counts) * group.size * ids.shape[1], "more rows than there can be"
            rows = moe_experts(arrived.x, arrived.ids, arrived.weights, packed(placement.local(group.rank)), LIMIT, arrived.sum_dtype)
            sums.append(exchange.combine(rows, arrived))
        exchange.close()
        return sums

    everything = packed(tuple(range(EXPERTS)))
    for number, sums in enumerate(run_group(len(counts), rank)):
        for turn, routed in enumerate(sums):
            alone = moe_experts(*tokens_of(number + 10 * turn, counts[number], torch.bfloat16), everything, LIMIT)
            assert routed.shape == alone.shape and routed.dtype == torch.bfloat16
            # Sums are rounded to bf16. Low latency also quantises hidden values to FP8 without their weight, so that each is rounded
            # otherwise than in the reference: twice an rms error of 2^-4 / sqrt(12) to 2^-4 / sqrt(3) of the value.
            limit = 0.05 if is_latency_bound else 0.005
            assert (routed - alone).norm() <= limit * alone.norm(), f"rank {number}, turn {turn}"
    sys.modules.pop("engine.ops.expert_exchange.deepep", None)


def test_in_decode_rows_that_only_fill_up_go_nowhere(deepep: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deepep, "HIDDEN_SIZES", (HIDDEN,))
    placement, filling = even_placement(EXPERTS, 2), torch.tensor([False, True, False, True, True])
    shape = ExchangeShape(hidden_size=HIDDEN, num_slots=EXPERTS, max_tokens=8, is_latency_bound=True)

    def rank(group: Group) -> tuple[int, torch.Tensor]:
        exchange = deepep.run(group, shape, reference_ops())
        x, ids, weights = tokens_of(group.rank, len(filling), torch.bfloat16)
        positions = torch.where(filling, -1, positions_of(x))
        arrived = exchange.dispatch(Tokens(x, ids, weights, positions, None), SlotChoice(placement, group.rank))
        rows = moe_experts(arrived.x, arrived.ids, arrived.weights, packed(placement.local(group.rank)), LIMIT, arrived.sum_dtype)
        return int(arrived.x.counts.sum()), exchange.combine(rows, arrived)

    found = run_group(2, rank)
    assert sum(count for count, _ in found) == 2 * int((~filling).sum()) * TOP_K
    for _, routed in found:
        assert routed[~filling].any(1).all() and not routed[filling].any()


@pytest.fixture
def deepep(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    """The adapter, with the stand-in for groups of two."""
    monkeypatch.setitem(sys.modules, "deep_ep", FakeDeepEP(2).module())
    monkeypatch.delitem(sys.modules, "engine.ops.expert_exchange.deepep", raising=False)
    monkeypatch.setenv("NVSHMEM_QP_DEPTH", "0")
    yield importlib.import_module("engine.ops.expert_exchange.deepep")
    sys.modules.pop("engine.ops.expert_exchange.deepep", None)


@pytest.mark.parametrize(
    ("size", "hidden", "is_latency_bound", "message"),
    [(2, 128, True, "hidden sizes 2048, .*the model has 128: choose gather"), (3, 4096, False, "groups of 2, 4, .*decode/0 has 3: choose")],
)
def test_what_has_no_kernels_is_refused_by_name(
    deepep: types.ModuleType, size: int, hidden: int, is_latency_bound: bool, message: str
) -> None:
    shape = ExchangeShape(hidden_size=hidden, num_slots=6, max_tokens=4, is_latency_bound=is_latency_bound)

    def rank(group: Group) -> None:
        with pytest.raises(ConfigError, match=message):
            deepep.run(group, shape, reference_ops())

    run_group(size, rank)


def test_a_rank_that_ends_alone_does_not_wait_for_the_others(deepep: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deepep, "HIDDEN_SIZES", (HIDDEN,))
    shape = ExchangeShape(hidden_size=HIDDEN, num_slots=4, max_tokens=4, is_latency_bound=True)

    def rank(group: Group) -> None:
        exchange = deepep.run(group, shape, reference_ops())
        if group.rank == 0:
            exchange.close()  # the other one never does
        else:
            group.close()

    run_group(2, rank, Limits(start_s=20.0, step_s=0.5))

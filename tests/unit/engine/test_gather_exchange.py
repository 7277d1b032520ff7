"""Experts by gathering, with equal rows, uneven rows, and no rows: decode has the reference's sums within the rounding of fp32; prompts
have those of bf16 parts, to the bit."""

from __future__ import annotations

import threading

import pytest
import torch

from engine.model.quantized import QuantizedRows
from engine.model.side_stream import SideStream
from engine.ops.expert_exchange import ExchangeShape, Tokens
from engine.ops.expert_exchange.gather import run
from engine.ops.moe_experts import moe_experts
from engine.parallel.expert_placement import ExpertPlacement, SlotChoice, even_placement
from engine.parallel.group import Group
from tests.support.experts import EXPERTS, HIDDEN, LIMIT, SKEWED, packed, positions_of, reference_ops, tokens_of
from tests.support.ranks import run_group


@pytest.mark.parametrize(
    ("is_latency_bound", "placement", "counts", "rows"),
    [
        (True, even_placement(8, 2), (6, 6), 8),
        (True, SKEWED, (3, 3, 3, 3), 0),
        (False, even_placement(8, 2), (7, 16), 20),
        (False, even_placement(8, 2), (0, 5), 5),
        (False, SKEWED, (4, 0, 9, 1), 0),
        (False, even_placement(8, 1), (4,), 4),
    ],
    ids=str,
)
def test_a_group_gives_the_sums_of_one_rank(is_latency_bound: bool, placement: ExpertPlacement, counts: tuple[int, ...], rows: int) -> None:
    shape = ExchangeShape(hidden_size=HIDDEN, num_slots=len(placement.experts), max_tokens=32, is_latency_bound=is_latency_bound)

    def rank(group: Group) -> torch.Tensor:
        exchange = run(group, shape, reference_ops())
        exchange.rows = rows
        x, ids, weights = tokens_of(group.rank, counts[group.rank], torch.bfloat16)
        positions, choice = positions_of(x), SlotChoice(placement, group.rank)
        positions[::3] = -1
        arrived = exchange.dispatch(Tokens(x, ids, weights, positions, None), choice)
        assert torch.equal(choice.load, torch.bincount(ids[positions >= 0].flatten(), minlength=EXPERTS)), "fillers are not counted"
        assert arrived.among == shape.num_slots, "pairs of experts elsewhere came, too"
        if is_latency_bound:  # the rows of each rank, in their order
            has_experts = (arrived.ids >= 0).any(1).view(group.size, -1)
            assert not has_experts[:, ::3].any() and has_experts.any(), "an expert would be read for a filler"
        return exchange.combine(
            moe_experts(arrived.x, arrived.ids, arrived.weights, packed(placement.local(group.rank)), LIMIT, arrived.sum_dtype), arrived
        )

    everything = packed(tuple(range(EXPERTS)))
    for number, routed in enumerate(run_group(placement.num_ranks, rank)):
        alone = moe_experts(*tokens_of(number, counts[number], torch.bfloat16), everything, LIMIT)
        assert routed.shape == alone.shape and routed.dtype == torch.float32
        real = torch.arange(len(alone)) % 3 != 0
        # A rank's part of a prompt's sum is rounded to bf16, 2^-9 of it at most; parts may be larger than their sum.
        tolerance = 1e-6 if is_latency_bound else 2**-8
        assert (routed - alone)[real].norm() <= tolerance * alone[real].norm(), f"rank {number}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("placement", "counts"), [(even_placement(8, 2), (7, 16)), (SKEWED, (4, 0, 9, 1))], ids=str)
def test_prompts_travel_in_fp8_and_come_back_in_bf16_unless_nothing_is_rounded(
    placement: ExpertPlacement, counts: tuple[int, ...], dtype: torch.dtype
) -> None:
    shape = ExchangeShape(hidden_size=HIDDEN, num_slots=len(placement.experts), max_tokens=32, is_latency_bound=False)
    of_rank = [packed(placement.local(rank)) for rank in range(placement.num_ranks)]

    def rank(group: Group) -> tuple[torch.Tensor, bool]:
        exchange = run(group, shape, reference_ops())
        x, ids, weights = tokens_of(group.rank, counts[group.rank], dtype)
        arrived = exchange.dispatch(Tokens(x, ids, weights, positions_of(x), None), SlotChoice(placement, group.rank))
        rows = moe_experts(arrived.x, arrived.ids, arrived.weights, of_rank[group.rank], LIMIT, arrived.sum_dtype)
        return exchange.combine(rows, arrived), isinstance(arrived.x, QuantizedRows)

    part_dtype = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    for number, (routed, is_quantized) in enumerate(run_group(placement.num_ranks, rank)):
        x, ids, weights = tokens_of(number, counts[number], dtype)
        slots, per_rank = SlotChoice(placement, number)(ids), placement.slots_per_rank
        total = torch.zeros(x.shape)
        for peer, experts in enumerate(of_rank):
            places = torch.where(slots // per_rank == peer, slots % per_rank, -1)
            total += moe_experts(x, places, weights, experts, LIMIT, part_dtype).float()
        assert is_quantized == (dtype == torch.bfloat16)
        assert torch.equal(routed, total), f"rank {number}"


def test_what_can_be_done_beside_is_done_before_other_ranks_sums_are_there() -> None:
    placement, done = even_placement(8, 2), threading.Event()
    shape = ExchangeShape(hidden_size=HIDDEN, num_slots=8, max_tokens=32, is_latency_bound=False)

    def rank(group: Group) -> bool:
        exchange = run(group, shape, reference_ops())
        x, ids, weights = tokens_of(group.rank, 3, torch.bfloat16)
        arrived = exchange.dispatch(Tokens(x, ids, weights, positions_of(x), None), SlotChoice(placement, group.rank))
        rows = moe_experts(arrived.x, arrived.ids, arrived.weights, packed(placement.local(group.rank)), LIMIT, arrived.sum_dtype)
        if group.rank == 0:
            exchange.combine(rows, arrived, done.set)
            return True
        is_done = done.wait(20)
        exchange.combine(rows, arrived)
        return is_done

    assert run_group(2, rank) == [True, True]


@pytest.mark.parametrize("late", [False, True])
def test_outside_graphs_work_on_a_side_is_done_once_at_its_start_or_its_join(late: bool) -> None:
    done: list[str] = []
    join = SideStream(torch.device("cpu")).start(lambda: done.append("work") or len(done), late)
    done.append("between")
    assert join() == join() == (2 if late else 1)
    assert done == (["between", "work"] if late else ["work", "between"])

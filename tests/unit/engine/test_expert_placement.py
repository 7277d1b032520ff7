"""Where experts and their copies go: every expert somewhere, none twice on a rank, the busiest rank as idle as it can be."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

import engine.parallel.expert_placement
from engine.parallel.expert_placement import (
    ExpertPlacement,
    SlotChoice,
    balanced_placement,
    even_placement,
    imbalance,
    rebalanced,
    relieved,
)


def test_without_redundancy_experts_keep_their_order() -> None:
    assert even_placement(8, 2).experts == tuple(range(8)) and even_placement(8, 2).local(1) == (4, 5, 6, 7)


def test_experts_that_do_not_divide_are_filled_up_with_copies() -> None:
    placement = even_placement(384, 40)  # 9.6 experts a rank
    assert placement.slots_per_rank == 10 and placement.num_experts == 384
    assert sorted(len(slots) for slots in placement.copies()) == [1] * 368 + [2] * 16


@pytest.mark.parametrize("seed", range(200))
def test_any_load_is_placed_and_copies_never_make_it_worse(seed: int) -> None:
    rng = random.Random(seed)
    num_ranks = rng.choice([1, 2, 3, 4, 8, 16])
    num_experts = rng.randint(num_ranks, 6 * num_ranks)
    slots_per_rank = rng.randint(-(-num_experts // num_ranks), min(num_experts, -(-num_experts // num_ranks) + 3))
    load = [rng.expovariate(1.0) ** 3 for _ in range(num_experts)]
    placement = balanced_placement(load, num_ranks, slots_per_rank)  # its own checks: all experts, none twice on a rank
    assert placement == balanced_placement(load, num_ranks, slots_per_rank)
    assert len(placement.experts) == num_ranks * slots_per_rank
    # Never over the mean by more than the heaviest copy: what greedy packing promises while slots are free.
    copies = placement.copies()
    heaviest = max(load[expert] / len(slots) for expert, slots in enumerate(copies))
    if slots_per_rank * num_ranks >= 2 * num_experts:
        assert imbalance(load, placement) <= 1 + heaviest * num_ranks / sum(load) + 1e-9


def test_a_skewed_load_is_evened_out_by_redundant_experts() -> None:
    load = [1.0 / (rank + 1) for rank in range(256)]  # the busiest expert has 256 times the load of the idlest
    plain, redundant = even_placement(256, 16), balanced_placement(load, 16, 18)
    assert imbalance(load, plain) > 8
    assert imbalance(load, redundant) < 1.05


def test_a_placement_that_loses_an_expert_or_holds_one_twice_is_a_mistake_of_ours() -> None:
    with pytest.raises(AssertionError, match="an expert has no slot"):
        ExpertPlacement((0, 2), 2)
    with pytest.raises(AssertionError, match="rank 0 holds an expert twice"):
        ExpertPlacement((0, 0, 1, 0), 2)


def test_tokens_take_turns_over_the_copies_of_their_expert() -> None:
    placement = ExpertPlacement((0, 1, 0, 2, 0, 3), 3)
    ids = torch.tensor([[0, 1]] * 6)
    chosen = [SlotChoice(placement, rank)(ids) for rank in range(3)]
    for rank, slots in enumerate(chosen):
        assert torch.equal(torch.tensor(placement.experts)[slots], ids)
        assert slots[0, 0] == 2 * rank  # one's own copy, or one's neighbour's, first
        assert sorted(slots[:, 0].tolist()) == [0, 0, 2, 2, 4, 4]


@pytest.mark.parametrize("seed", range(100))
def test_a_few_experts_that_move_relieve_the_busiest_rank_as_well_as_a_placement_from_scratch(seed: int) -> None:
    rng = random.Random(seed)
    num_ranks, slots_per_rank, num_experts = rng.choice([(2, 64, 128), (2, 66, 128), (4, 32, 128), (4, 34, 128), (8, 10, 64), (16, 5, 64)])
    load = [(expert + 1) ** -0.6 for expert in range(num_experts)]
    rng.shuffle(load)
    old = even_placement(num_experts, num_ranks, num_ranks * slots_per_rank - num_experts)
    new = relieved(load, old, 16)  # its own checks: all experts, none twice on a rank
    assert new == relieved(load, old, 16) and new.slots_per_rank == slots_per_rank
    assert imbalance(load, new) <= imbalance(load, balanced_placement(load, num_ranks, slots_per_rank)) + 0.002 <= 1.1
    assert max(moves(new, old)) <= 16 and sum(moves(new, old)) <= len(new.experts) / 4 + 2 * (len(old.experts) - num_experts)
    assert rebalanced(load, new, 0.05, 16) is None


def moves(new: ExpertPlacement, old: ExpertPlacement) -> list[int]:
    """Experts that are new to a rank, by rank."""
    return [len(set(new.local(rank)) - set(old.local(rank))) for rank in range(old.num_ranks)]


@pytest.mark.parametrize("seed", range(100))
def test_no_more_move_than_may_and_no_round_makes_it_worse(seed: int) -> None:
    rng = random.Random(seed)
    num_ranks = rng.choice([2, 3, 5, 8])
    num_experts = rng.randint(2 * num_ranks, 8 * num_ranks)
    held = even_placement(num_experts, num_ranks, rng.randint(0, 2 * num_ranks))
    load = [rng.expovariate(1.0) ** 3 for _ in range(num_experts)]
    for _ in range(12):
        before, held = held, relieved(load, held, 1)
        assert max(moves(held, before)) <= 1 and imbalance(load, held) <= imbalance(load, before)


def test_ranks_that_have_equally_much_to_do_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their sums are equal, but for their rounding: exchanges that gain nothing were made for ever."""
    exchange, made = engine.parallel.expert_placement._experts_to_exchange, 0

    def counted(*arguments: Any) -> Any:
        nonlocal made
        made += 1
        assert made < 100, "exchanges do not end"
        return exchange(*arguments)

    monkeypatch.setattr(engine.parallel.expert_placement, "_experts_to_exchange", counted)
    held = (0, 2, 3, 5, 1, 2, 4, 5, 0, 1, 2, 4, 0, 1, 3, 4, 0, 1, 3, 5)
    load = [0, 49.99436731434383, 1, 1000, 0, 0]
    assert imbalance(load, relieved(load, ExpertPlacement(held, 5), 8)) == pytest.approx(1.0)
    rng = random.Random(4)
    for _ in range(200):
        num_experts, num_ranks = rng.randint(2, 9), rng.randint(2, 5)
        slots = rng.randint(-(-num_experts // num_ranks), num_experts)
        loads = [rng.choice((0, 1, 3, 1000, rng.random())) for _ in range(num_experts)]
        made = 0
        relieved([*loads[:-1], 7], balanced_placement([1.0] * num_experts, num_ranks, slots), rng.randint(0, 8))


def test_a_placement_is_kept_unless_another_one_gains_enough() -> None:
    old = ExpertPlacement((0, 1, 2, 3, 4, 5, 6, 7, 0, 1), 2)
    assert rebalanced([2, 2, 1, 1, 1, 1, 1, 1], old, 0.05, 8) is None and rebalanced([0] * 8, old, 0.05, 8) is None
    skewed = [1, 1, 100, 100, 100, 1, 1, 1]
    better = rebalanced(skewed, old, 0.05, 8)
    assert better is not None and imbalance(skewed, better) < 0.95 * imbalance(skewed, old)
    assert rebalanced(skewed, better, 0.05, 8) is None


def test_another_placement_fits_into_the_tables_of_the_first() -> None:
    placements = [even_placement(8, 4, 4), balanced_placement([100, 1, 1, 1, 1, 1, 1, 1], 4, 3)]
    assert max(map(len, placements[1].copies())) == 4
    choose = SlotChoice(placements[0], 1)
    ids = torch.arange(8)[:, None].repeat(5, 1)
    for placement in (*placements, placements[0]):
        choose.update(placement)
        assert torch.equal(torch.tensor(placement.experts)[choose(ids)], ids)

"""Which rank of a group holds which experts. Pure.

    slots      [ 0 1 2 3 | 4 5 6 7 ]      two ranks with four slots each; rank r holds slots [r n, (r + 1) n)
    experts    [ 0 1 2 0 | 3 4 5 2 ]      experts 0 and 2 have two copies: redundant ones, for experts with much to do

A token may go to any copy of its expert: all copies are the same bytes, so the choice changes where the work is done and no result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch


@dataclass(frozen=True, slots=True)
class ExpertPlacement:
    """One layer's."""

    experts: tuple[int, ...]
    """The expert in each slot; every expert has at least one."""
    num_ranks: int

    def __post_init__(self) -> None:
        assert len(self.experts) % self.num_ranks == 0, f"{len(self.experts)} slots on {self.num_ranks} ranks"
        assert set(self.experts) == set(range(self.num_experts)), "an expert has no slot"
        for rank in range(self.num_ranks):
            assert len(set(self.local(rank))) == self.slots_per_rank, f"rank {rank} holds an expert twice: {self.local(rank)}"

    @property
    def num_experts(self) -> int:
        return max(self.experts) + 1

    @property
    def slots_per_rank(self) -> int:
        return len(self.experts) // self.num_ranks

    def local(self, rank: int) -> tuple[int, ...]:
        """The experts of a rank, by slot."""
        return self.experts[rank * self.slots_per_rank : (rank + 1) * self.slots_per_rank]

    def copies(self) -> list[list[int]]:
        """The slots of each expert."""
        found: list[list[int]] = [[] for _ in range(self.num_experts)]
        for slot, expert in enumerate(self.experts):
            found[expert].append(slot)
        return found


class SlotChoice:
    """Expert ids -> slots, as tables on a device: rank r's tokens use copy r mod copies first, then take turns. And how many they were."""

    def __init__(self, placement: ExpertPlacement, rank: int, device: torch.device | str = "cpu") -> None:
        self._rank = rank
        # As many copies of one expert as there can be with so many slots, so that another placement fits into the same memory.
        self._widest = min(placement.num_ranks, len(placement.experts) - placement.num_experts + 1)
        self.table = torch.zeros(placement.num_experts, self._widest, dtype=torch.int64, device=device)
        """Slots of each expert, by turn."""
        self.turns = torch.zeros(placement.num_experts, dtype=torch.int64, device=device)
        """How many of them differ."""
        self.load = torch.zeros(placement.num_experts, dtype=torch.int64, device=device)
        """Tokens that each expert has had, since the start."""
        self.update(placement)

    def update(self, placement: ExpertPlacement) -> None:
        """Another placement of as many experts in as many slots, from the next call on; in place, for CUDA graphs."""
        copies = placement.copies()
        rows = [[slots[(self._rank + turn) % len(slots)] for turn in range(self._widest)] for slots in copies]
        self.table.copy_(torch.tensor(rows))
        self.turns.copy_(torch.tensor([len(slots) for slots in copies]))

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """ids: int64 [T, k] -> int64 [T, k]."""
        return choose_slots(ids, self.table, self.turns)

    def counted(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """The same; tokens with a position (int64 [T], -1 for none) count as load."""
        count_tokens(self.load, ids, positions)
        return self(ids)


def choose_slots(ids: torch.Tensor, table: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """ids: int64 [T, k], experts -> int64 [T, k], the slot of token t: table[id, t mod turns[id]]."""
    turn = torch.arange(len(ids), device=ids.device)[:, None] % turns[ids]
    return table[ids, turn]


def count_tokens(load: torch.Tensor, ids: torch.Tensor, positions: torch.Tensor) -> None:
    """Add to load[id] the tokens with a position >= 0 that have it. ids: int64 [T, k]; positions: int64 [T]."""
    load.index_add_(0, ids.flatten(), (positions >= 0).long().repeat_interleave(ids.shape[1], output_size=ids.numel()))


def even_placement(num_experts: int, num_ranks: int, num_redundant: int = 0) -> ExpertPlacement:
    """Before any load is known: ceil((experts + redundant) / ranks) slots a rank; slots left over hold second copies."""
    slots_per_rank = -(-(num_experts + num_redundant) // num_ranks)
    if slots_per_rank * num_ranks == num_experts:
        return ExpertPlacement(tuple(range(num_experts)), num_ranks)
    return balanced_placement([1.0] * num_experts, num_ranks, slots_per_rank)


def balanced_placement(load: Sequence[float], num_ranks: int, slots_per_rank: int) -> ExpertPlacement:
    """From measured load (tokens of each expert), make the busiest rank as idle as two greedy rules can:

    copies     one each; every further slot goes to the expert with the most load a copy (at most one copy a rank)
    ranks      copies from the heaviest to the lightest, each to the least loaded rank with a free slot and without that expert

    Needs num_ranks * slots_per_rank >= len(load). The same load gives the same placement on every rank.
    """
    num_slots = num_ranks * slots_per_rank
    assert len(load) <= num_slots <= len(load) * num_ranks, f"{len(load)} experts in {num_slots} slots of {num_ranks} ranks"
    copies = [1] * len(load)
    for _ in range(num_slots - len(load)):
        growing = [expert for expert in range(len(load)) if copies[expert] < num_ranks]
        copies[max(growing, key=lambda expert: (load[expert] / copies[expert], -expert))] += 1
    pieces = [(load[expert] / count, expert) for expert, count in enumerate(copies) for _ in range(count)]
    ranks: list[list[int]] = [[] for _ in range(num_ranks)]
    totals = [0.0] * num_ranks
    for weight, expert in sorted(pieces, key=lambda piece: (-piece[0], piece[1])):
        free = [rank for rank in range(num_ranks) if len(ranks[rank]) < slots_per_rank]
        fitting = [rank for rank in free if expert not in ranks[rank]]
        if not fitting:
            fitting = [_make_room(ranks, totals, [load[e] / copies[e] for e in range(len(load))], expert, free[0])]
        rank = min(fitting, key=lambda rank: (totals[rank], rank))
        ranks[rank].append(expert)
        totals[rank] += weight
    return ExpertPlacement(tuple(expert for held in ranks for expert in sorted(held)), num_ranks)


def _make_room(ranks: list[list[int]], totals: list[float], weights: Sequence[float], expert: int, free: int) -> int:
    """All ranks with a free slot hold `expert` already: move a light expert from a rank without it to rank `free`. That rank."""
    movable = [
        (weights[moved], rank, moved) for rank, held in enumerate(ranks) if expert not in held for moved in held if moved not in ranks[free]
    ]
    weight, giver, moved = min(movable)
    ranks[giver].remove(moved)
    ranks[free].append(moved)
    totals[giver] -= weight
    totals[free] += weight
    return giver


def relieved(load: Sequence[float], old: ExpertPlacement, most: int) -> ExpertPlacement:
    """`old` with a few experts elsewhere, at most `most` that are new to a rank, so that the busiest rank has less to do:

    copies     while one is worth it, the expert with the most load a copy gets one more, for one of the expert that misses it least
    ranks      while it helps, the busiest rank exchanges an expert with another: the pair that leaves the busier of both with the least

    or only the second, where the first leaves it no way. The same load gives the same placement on every rank.
    """
    found = [_relieved(load, old, most, changes_copies) for changes_copies in (True, False)]
    return min(found, key=lambda one: imbalance(load, one))


def _relieved(load: Sequence[float], old: ExpertPlacement, most: int, changes_copies: bool) -> ExpertPlacement:
    tokens = np.asarray(load, dtype=np.float64)
    before = np.array(old.experts).reshape(old.num_ranks, -1)
    held, has = before.copy(), np.zeros((old.num_ranks, len(tokens)), dtype=bool)
    np.put_along_axis(has, held, True, axis=1)

    def put(rank: int, place: int, expert: int) -> None:
        has[rank, held[rank, place]] = False
        has[rank, expert] = True
        held[rank, place] = expert

    def may_change() -> npt.NDArray[np.bool_]:
        """[ranks, places]"""
        changed = held != before
        return changed | (changed.sum(1) < most)[:, None]

    while changes_copies and (found := _copy_to_make(tokens, held, has, may_change())) is not None:
        put(*found)
    while (pair := _experts_to_exchange(tokens, held, has, may_change())) is not None:
        (mine, place), (other, there) = pair
        giving, coming = held[mine, place], held[other, there]
        put(mine, place, coming)
        put(other, there, giving)
    return ExpertPlacement(tuple(held.flatten().tolist()), old.num_ranks)


WORTH = 0.95
"""What a change must make of the load that it is for, at most: others are luck."""

LUCK = 1e-9
"""Share of the mean by which sums of the same loads may differ, since they are rounded."""


def _copy_to_make(
    tokens: npt.NDArray[np.float64], held: npt.NDArray[np.int64], has: npt.NDArray[np.bool_], may_change: npt.NDArray[np.bool_]
) -> tuple[int, int, int] | None:
    """(rank, place, the expert to put there), for `relieved`."""
    copies = has.sum(0)
    share = tokens / copies
    heaviest = int(np.argmax(np.where(copies < len(held), share, -1.0)))
    after = np.where(copies > 1, tokens / np.maximum(copies - 1, 1), np.inf)[held]
    after = np.where(may_change & ~has[:, [heaviest]], after, np.inf)
    if copies[heaviest] == len(held) or not after.min() < WORTH * share[heaviest]:
        return None
    totals = share[held].sum(1)
    rank, place = min(zip(*np.nonzero(after == after.min()), strict=True), key=lambda at: (totals[at[0]], at))
    return int(rank), int(place), heaviest


def _experts_to_exchange(
    tokens: npt.NDArray[np.float64], held: npt.NDArray[np.int64], has: npt.NDArray[np.bool_], may_change: npt.NDArray[np.bool_]
) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """((the busiest rank, place), (another rank, place)), for `relieved`."""
    weight = (tokens / has.sum(0))[held]
    totals = weight.sum(1)
    busiest = int(np.argmax(totals))
    less = weight[busiest][:, None, None] - weight[None]  # [places of the busiest, ranks, places]
    then = np.maximum(totals[busiest] - less, totals[None, :, None] + less)
    is_possible = may_change[busiest][:, None, None] & may_change[None]
    is_possible &= ~has[:, held[busiest]].T[:, :, None] & ~has[busiest][held][None]
    then = np.where(is_possible, then, np.inf)
    place, other, there = np.unravel_index(np.argmin(then), then.shape)
    mean = totals.mean()
    too_much = totals[busiest] - mean
    if too_much <= LUCK * mean or not then[place, other, there] - mean < WORTH * too_much:
        return None
    return (busiest, int(place)), (int(other), int(there))


def rebalanced(load: Sequence[float], old: ExpertPlacement, least_gain: float, most: int) -> ExpertPlacement | None:
    """A better placement for this load, with at most `most` experts that are new to a rank, or None if the busiest rank would not lose at
    least `least_gain` (a share) of its work."""
    if not any(load):
        return None
    new = relieved(load, old, most)
    return new if imbalance(load, new) <= (1 - least_gain) * imbalance(load, old) else None


def imbalance(load: Sequence[float], placement: ExpertPlacement) -> float:
    """Busiest rank over the mean, if every expert's tokens spread evenly over its copies: 1 is perfect. `load` must not be all 0."""
    copies = placement.copies()
    totals = [sum(load[expert] / len(copies[expert]) for expert in placement.local(rank)) for rank in range(placement.num_ranks)]
    return max(totals) * placement.num_ranks / sum(totals)

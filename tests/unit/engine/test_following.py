"""Ranks that attend together: rows and columns that go around, and runners that do what another one does."""

from __future__ import annotations

import queue
import random
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from core.errors import ConfigError, GroupLost, InternalError
from core.request import Request, SamplingParams
from engine.batch import Chunk
from engine.following import Following, LeadingRunner
from engine.parallel.group import Group
from engine.parallel.heads import HeadShare
from engine.runner import Launched
from engine.sequence import Sequence
from tests.support.null_runner import NullRunner
from tests.support.ranks import LIMITS, run_group

MODEL: Any = SimpleNamespace(num_attention_heads=8, o_groups=4)
PAGES, SLOTS = 24, 6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("size", "count"), [(2, 0), (2, 1), (2, 2), (2, 5), (4, 1), (4, 5), (4, 8)])
def test_rows_and_columns_come_together_in_the_order_of_ranks(size: int, count: int, dtype: torch.dtype) -> None:
    rows, columns = torch.arange(count * 3).reshape(count, 3).to(dtype), torch.arange(count * 8).reshape(count, 8).to(dtype)

    def rank(group: Group) -> None:
        heads = HeadShare(group, size, MODEL)
        assert heads.leader == f"decode/0.{group.rank // size * size}"
        base = 100 * (group.rank // size)  # two pairs do not hear of each other
        mine = heads.mine(rows + base, filler=-1)
        assert len(mine) == heads.rows_each(count) == -(-count // size)
        assert (mine[len(rows[heads.rank * len(mine) :]) :] == -1).all()
        assert torch.equal(heads.whole(mine, count), rows + base)
        assert torch.equal(heads.columns((columns + base)[:, heads.part(8)]), columns + base)

    run_group(4, rank)


@pytest.mark.parametrize("length", [1, 8183, 8184, 8185, 100_000])
def test_those_that_follow_hear_what_the_leader_tells(length: int) -> None:
    order = random.Random(length).randbytes(length)

    def rank(group: Group) -> bytes:
        heads = HeadShare(group, group.size, MODEL)
        if heads.rank == 0:
            heads.tell(order)
            return order
        return heads.hear()

    assert run_group(4, rank) == [order] * 4


def test_a_rank_that_waits_for_a_word_is_free_once_the_leader_leaves() -> None:
    """What closes with a group may wait for all ranks, a device's memory that they share, say."""
    began = time.monotonic()

    def rank(group: Group) -> None:
        heads = HeadShare(group, group.size, MODEL)
        group.before_close(group.barrier)
        if heads.rank:
            with pytest.raises(GroupLost):
                heads.hear()
        group.close()

    run_group(2, rank)
    assert time.monotonic() - began < LIMITS.step_s


@pytest.mark.parametrize(("heads", "groups"), [(6, 4), (8, 2)])
def test_heads_that_do_not_spread_are_refused(heads: int, groups: int) -> None:
    model: Any = SimpleNamespace(num_attention_heads=heads, o_groups=groups)
    group: Any = SimpleNamespace(rank=0, seat=SimpleNamespace(name="decode/0"))
    with pytest.raises(
        ConfigError, match=f"decode/0: attention_tp is 4; it must divide the model's {heads} heads and its {groups} output groups"
    ):
        HeadShare(group, 4, model)


class Wire:
    """The ends of a HeadShare of two ranks in one thread: what the leader says is kept until it is heard."""

    def __init__(self) -> None:
        self.said: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def leader(self) -> Any:
        return SimpleNamespace(rank=0, leader="decode/0.0", tell=self.said.put, copy=lambda rows: self.said.put(rows.clone()))

    def follower(self) -> Any:
        def copy(rows: torch.Tensor) -> None:
            rows.copy_(self.said.get_nowait())

        return SimpleNamespace(rank=1, leader="decode/0.0", hear=self.said.get_nowait, copy=copy)


def null_runner() -> NullRunner:
    return NullRunner(num_pages=PAGES, num_slots=SLOTS, vocab_size=50, max_model_len=2048, overlap=True)


def sequence_of(name: str, length: int, max_tokens: int, rng: random.Random) -> Sequence:
    sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True, seed=rng.randrange(1000), temperature=1.0)
    ids = tuple(rng.randrange(2, 50) for _ in range(length))
    return Sequence.from_request(Request(request_id=name, token_ids=ids, prompt_len=length, sampling=sampling))


class Pair:
    """A leading and a following runner, whose sequences come by transfer or are computed here, go on, are passed over and go away."""

    def __init__(self, rng: random.Random) -> None:
        self.rng, wire = rng, Wire()
        self.inner, self.other = null_runner(), null_runner()
        self.leading = LeadingRunner(self.inner, wire.leader())
        self.following = Following(self.other, wire.follower())
        self.running: list[Sequence] = []
        self.expected: dict[str, list[int]] = {}
        self.free_pages, self.free_slots = set(range(PAGES)), set(range(SLOTS))
        self.flights: list[Launched] = []
        self.num_arrived = self.num_finished = 0

    def grow(self, sequence: Sequence, tokens: int) -> None:
        while len(sequence.page_ids) * 256 < tokens:
            sequence.page_ids.append(self.rng.choice(sorted(self.free_pages)))
            self.free_pages.remove(sequence.page_ids[-1])

    def begin(self, number: int) -> None:
        sequence = sequence_of(f"r{number}", self.rng.choice((1, 200, 255, 256, 400)), self.rng.choice((2, 3, 60)), self.rng)
        self.expected[sequence.request_id] = self.inner.continuation(sequence.token_ids, sequence.request.sampling)
        sequence.slot_id = self.rng.choice(sorted(self.free_slots))
        self.free_slots.remove(sequence.slot_id)
        self.grow(sequence, len(sequence.token_ids) + 70)
        if self.rng.random() < 0.5:
            self.leading.clear_slot(sequence.slot_id)
        else:  # as a transfer writes: behind the leader's back
            self.num_arrived += 1
            self.inner.clear_slot(sequence.slot_id)
            self.inner.step([Chunk(sequence, len(sequence.token_ids))])
            self.leading.arrived(tuple(sequence.page_ids), sequence.slot_id)
        self.running.append(sequence)

    def collect(self) -> None:
        self.leading.collect(self.flights.pop(0))
        for sequence in [one for one in self.running if one.finish_reason is not None]:
            assert sequence.token_ids[sequence.request.prompt_len :] == self.expected[sequence.request_id]
            self.num_finished += 1
            self.leave(sequence)

    def leave(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.free_pages |= set(sequence.page_ids)
        self.free_slots.add(sequence.slot_id)

    def step(self) -> None:
        under_way = {id(chunk.sequence) for launched in self.flights for chunk in launched.chunks}
        chosen = [one for one in self.running if id(one) not in under_way and self.rng.random() < 0.9]
        chunks = [Chunk(one, one.num_remaining if self.rng.random() < 0.7 else 1) for one in chosen]
        if chunks:
            self.flights.append(self.leading.launch(chunks))
            self.following.step()
        if self.flights and (len(self.flights) > 1 or not chunks or self.rng.random() < 0.5):
            self.collect()


@pytest.mark.parametrize("seed", range(3))
def test_a_runner_that_follows_computes_what_the_leading_one_does(seed: int) -> None:
    """The null runners look at every byte of what lies in a sequence's pages and slot at each of its steps."""
    rng = random.Random(seed)
    pair = Pair(rng)
    for number in range(300):
        if pair.free_slots and rng.random() < 0.3:
            pair.begin(number)
        if rng.random() < 0.03 and pair.running and not pair.flights:
            pair.leave(rng.choice(pair.running))
        pair.step()
    while pair.running:
        pair.step()
    assert pair.num_arrived > 10 and pair.num_finished > 20


def test_a_runner_that_has_drawn_another_token_is_found_out() -> None:
    rng = random.Random(1)
    pair = Pair(rng)
    pair.begin(0)
    sequence = pair.running[0]
    while sequence.num_remaining > 1 or sequence.num_computed == 0:
        pair.flights.append(pair.leading.launch([Chunk(sequence, sequence.num_remaining)]))
        pair.following.step()
        pair.leading.collect(pair.flights.pop())
    pair.flights.append(pair.leading.launch([Chunk(sequence, 1)]))
    pair.following.step()
    pair.leading.collect(pair.flights.pop())
    sequence.token_ids[-1] ^= 1
    pair.leading.launch([Chunk(sequence, 1)])
    with pytest.raises(InternalError, match=r"on decode/0\.0, which computes the same"):
        pair.following.step()

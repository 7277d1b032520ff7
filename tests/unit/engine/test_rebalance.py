"""Experts that move while a group serves: no token changes, and the busiest rank has less to do."""

from __future__ import annotations

import dataclasses
import pathlib
import random
import threading
import time

import pytest
import torch

from core.clock import SystemClock
from core.errors import ConfigError, GroupLost
from core.request import Request, SamplingParams
from engine.batch import Chunk
from engine.config import EngineConfig
from engine.engine import Engine, LoadedModel
from engine.parallel.expert_placement import ExpertPlacement, imbalance
from engine.parallel.experts import ExpertShare, Sharing
from engine.parallel.group import Group
from engine.parallel.lockstep import GroupSteps
from engine.parallel.packed import check_expert, put_expert
from engine.parallel.rebalance import MOST_COMING, Rebalancer, batches_of, moving_bytes, new_rebalancer
from engine.runner import ModelRunner
from engine.sequence import Sequence
from tests.support.experts import packed
from tests.support.patience import overload
from tests.support.ranks import run_group

ENGINE = EngineConfig(device="cpu", max_model_len=1024, rebalance_interval_s=0.05)
TOKENS = 12


def request_of(rank: int) -> Request:
    ids = tuple(torch.randint(3, 500, (30 + rank,), generator=torch.Generator().manual_seed(rank)).tolist())
    return Request(request_id=str(rank), token_ids=ids, prompt_len=len(ids), sampling=SamplingParams(max_tokens=TOKENS, ignore_eos=True))


def tokens_alone(checkpoint: pathlib.Path, size: int) -> list[list[int]]:
    engine = Engine(LoadedModel.load(checkpoint, ENGINE), num_pages=16, num_slots=4)
    return [generation.token_ids for generation in engine.generate([request_of(rank) for rank in range(size)])]


def new_sequence(runner: ModelRunner, rank: int) -> Sequence:
    sequence = Sequence.from_request(request_of(rank))
    sequence.page_ids, sequence.slot_id = [0, 1], 0
    runner.clear_slot(0)
    return sequence


def random_placement(rng: random.Random, num_experts: int, num_ranks: int, slots_per_rank: int) -> ExpertPlacement:
    while True:
        ranks = [rng.sample(range(num_experts), slots_per_rank) for _ in range(num_ranks)]
        experts = tuple(expert for held in ranks for expert in held)
        if set(experts) == set(range(num_experts)):
            return ExpertPlacement(experts, num_ranks)


def test_placements_that_change_between_any_two_steps_change_no_token(small_checkpoint: pathlib.Path) -> None:
    def rank(group: Group) -> list[int]:
        loaded = LoadedModel.load(small_checkpoint, ENGINE, Sharing(group=group, max_tokens=64, is_latency_bound=True, num_redundant=2))
        share, rng = loaded.share, random.Random(5)
        assert share is not None
        runner = ModelRunner(loaded, 2, 1)
        sequence = new_sequence(runner, group.rank)
        for _ in range(TOKENS):
            for layer in range(4):
                prefix = f"layers.{layer}.ffn"
                placement = random_placement(rng, 4, 2, 3)
                coming = {}
                for place, expert in share.layers[prefix].missing(placement).items():
                    weights = ([loaded.everything[f"{prefix}.experts.{expert}.{name}.weight"]] for name in ("w1", "w2", "w3"))
                    coming[place] = loaded.ops.pack["moe_experts"](*weights, True)
                share.layers[prefix].move(placement, coming)
            runner.step([Chunk(sequence, sequence.num_remaining)])
        return sequence.token_ids[sequence.request.prompt_len :]

    assert run_group(2, rank) == tokens_alone(small_checkpoint, 2)


def num_moved(share: ExpertShare) -> int:
    return sum(layer.num_moves for layer in share.layers.values())


def test_a_group_under_skewed_load_moves_experts_while_it_steps(small_checkpoint: pathlib.Path) -> None:
    """The load is made up: expert 0 of each layer has had by far the most to do. Steps go on until every layer has moved."""
    skew = [1000, 10, 400, 10]
    done = threading.Barrier(2)

    def rank(group: Group) -> tuple[list[int], list[float], int]:
        steps = GroupSteps(group, max, SystemClock())
        steps.start(lambda: None, pytest.fail)
        loaded = LoadedModel.load(small_checkpoint, ENGINE, Sharing(group=group, max_tokens=64, is_latency_bound=True, num_redundant=2))
        share = loaded.share
        assert share is not None
        runner = ModelRunner(loaded, 2, 1)
        sequence = new_sequence(runner, group.rank)
        rebalancer = new_rebalancer(loaded, group, steps, pytest.fail)
        assert isinstance(rebalancer, Rebalancer)
        for layer in range(4):
            share.layers[f"layers.{layer}.ffn"].choice.load += torch.tensor(skew)
        rebalancer.start()
        end = time.monotonic() + 30 * overload()
        while (sequence.finish_reason is None or num_moved(share) < 4) and time.monotonic() < end:
            wanted = int(sequence.finish_reason is None or num_moved(share) < 4)
            if steps.agreed(wanted) is None:
                time.sleep(0.001)
                continue
            steps.begin(wanted)
            # Held back at its last token until the moves are over, so that they happen under work.
            may_go_on = sequence.finish_reason is None and (sequence.num_output_tokens < TOKENS - 1 or num_moved(share) == 4)
            runner.step([Chunk(sequence, sequence.num_remaining)] if may_go_on else [])
        after = [imbalance(skew, share.layers[f"layers.{layer}.ffn"].placement) for layer in range(4)]
        serve_peers(steps, runner)
        rebalancer.close()
        group.close()
        return sequence.token_ids[sequence.request.prompt_len :], after, num_moved(share)

    def serve_peers(steps: GroupSteps, runner: ModelRunner) -> None:
        """The other rank may need a few steps more. Whoever leaves first ends the step that the other may be in."""
        waiting = threading.Thread(target=done.wait, args=(20 * overload(),))
        waiting.start()
        try:
            while waiting.is_alive():
                if steps.agreed(0) is None:
                    time.sleep(0.001)
                else:
                    steps.begin(0)
                    runner.step([])
        except GroupLost:  # the other one has left, so both were there
            waiting.join()
            assert not done.broken
        steps.close()

    results = run_group(2, rank)
    assert [tokens for tokens, _, _ in results] == tokens_alone(small_checkpoint, 2)
    assert all(num_moved >= 4 for _, _, num_moved in results)
    for _, after, _ in results:
        assert max(after) < 1.1  # 1000 and 400 against 10 and 10: two copies of each of the two busy ones


@pytest.mark.parametrize(("tokens", "has_room"), [(100, True), (5000, False)])
def test_experts_stay_where_few_tokens_were_counted_and_where_a_rank_has_no_room(
    small_checkpoint: pathlib.Path, monkeypatch: pytest.MonkeyPatch, tokens: int, has_room: bool
) -> None:
    """Rank 1 is out of memory when it is to read: both go on with what they have, and nobody dies."""
    refused: list[object] = []

    def rank(group: Group) -> tuple[bool, int, int, set[tuple[int, ...]]]:
        steps = GroupSteps(group, max, SystemClock())
        steps.start(lambda: None, pytest.fail)
        loaded = LoadedModel.load(small_checkpoint, ENGINE, Sharing(group=group, max_tokens=64, is_latency_bound=True))
        share, rebalancer = loaded.share, new_rebalancer(loaded, group, steps, pytest.fail)
        assert share is not None and rebalancer is not None
        if group.rank and not has_room:
            monkeypatch.setattr(rebalancer, "_read", out_of_memory)
        for layer in range(4):
            share.layers[f"layers.{layer}.ffn"].choice.load += torch.tensor([tokens, tokens // 2, 1, 1])
        is_going_on = rebalancer._round(0)
        assert bool(rebalancer._keys) == (group.rank == 0), "who forgets no round must not remember it"
        group.barrier()
        steps.close()
        return is_going_on, num_moved(share), share.num_awaited, {layer.placement.experts for layer in share.layers.values()}

    def out_of_memory(*arguments: object) -> None:
        refused.append(arguments)
        raise torch.OutOfMemoryError("no room")

    assert run_group(2, rank) == [(True, 0, 0, {(0, 1, 2, 3)})] * 2
    assert bool(refused) == (not has_room), "experts were to move, and only where many tokens were counted"


def test_layers_move_together_as_long_as_no_rank_reads_too_many_experts() -> None:
    count = 4 * MOST_COMING
    now = ExpertPlacement(tuple(range(2 * count)), 2)

    def exchanged(number: int) -> ExpertPlacement:
        experts = list(range(2 * count))
        experts[:number], experts[count : count + number] = experts[count : count + number], experts[:number]
        return ExpertPlacement(tuple(experts), 2)

    plan = {str(place): exchanged(number) for place, number in enumerate((MOST_COMING - 1, 1, 1, MOST_COMING + 5, 2))}
    batches = batches_of(plan, dict.fromkeys(plan, now))
    assert [list(batch) for batch in batches] == [["0", "1"], ["2"], ["3"], ["4"]]
    assert {prefix: experts for batch in batches for prefix, experts in batch.items()} == {p: new.experts for p, new in plan.items()}
    assert batches_of({}, {}) == []


def test_a_move_writes_into_the_memory_that_graphs_have_captured(small_checkpoint: pathlib.Path) -> None:
    def rank(group: Group) -> None:
        loaded = LoadedModel.load(small_checkpoint, ENGINE, Sharing(group=group, max_tokens=64, is_latency_bound=True, num_redundant=2))
        assert loaded.share is not None
        layer = loaded.share.layers["layers.1.ffn"]
        tensors = [layer.choice.table, layer.choice.turns, layer.choice.load, layer.experts.w13, layer.experts.w2]
        before, addresses = [one.clone() for one in tensors], [one.data_ptr() for one in tensors]
        placement = random_placement(random.Random(1), 4, 2, 3)
        rows = ([loaded.everything[f"layers.1.ffn.experts.{expert}.{name}.weight"]] for expert in range(4) for name in ("w1", "w2", "w3"))
        every = list(rows)
        coming = {
            place: loaded.ops.pack["moe_experts"](*every[3 * expert : 3 * expert + 3], True)
            for place, expert in layer.missing(placement).items()
        }
        layer.move(placement, coming)
        now = [layer.choice.table, layer.choice.turns, layer.choice.load, layer.experts.w13, layer.experts.w2]
        assert coming and [one.data_ptr() for one in now] == addresses
        assert [torch.equal(a, b) for a, b in zip(now, before, strict=True)] == [False, False, True, False, False]

    run_group(2, rank)


def test_a_gpu_keeps_room_for_experts_that_come(small_checkpoint: pathlib.Path) -> None:
    def rank(group: Group) -> None:
        loaded = LoadedModel.load(small_checkpoint, ENGINE, Sharing(group=group, max_tokens=64, is_latency_bound=True))
        assert loaded.share is not None
        one = loaded.share.layers["layers.0.ffn"].experts
        assert moving_bytes(loaded) == 0  # on a CPU
        on_gpu = dataclasses.replace(loaded, device=torch.device("cuda"))
        assert moving_bytes(on_gpu) > MOST_COMING * (one.w13[0].nbytes + one.w2[0].nbytes)
        assert moving_bytes(dataclasses.replace(on_gpu, engine=dataclasses.replace(ENGINE, rebalance_interval_s=0.0))) == 0

    run_group(2, rank)


def test_an_expert_takes_anothers_place_and_leaves_the_rest_alone() -> None:
    mine, one = packed((0, 1, 2)), packed((7,))
    put_expert(mine, 1, one)
    expected = packed((0, 7, 2))
    assert torch.equal(mine.w13, expected.w13) and torch.equal(mine.w2, expected.w2)


def test_an_expert_of_which_a_claim_does_not_hold_is_refused() -> None:
    mine, one = packed((0, 1)), packed((7,))
    with pytest.raises(ConfigError, match="quantize_activations is False"):
        check_expert(mine, dataclasses.replace(one, quantize_activations=False))
    with pytest.raises(ConfigError, match="w2 is"):
        check_expert(mine, dataclasses.replace(one, w2=one.w2[:, :, :-1]))
    check_expert(dataclasses.replace(mine, quantize_activations=False), one)

"""Experts spread over a group: the same bits as on one rank, whatever the group, the placement and who has tokens."""

from __future__ import annotations

import pathlib
import threading

import pytest
import torch

from core.errors import GroupLost
from core.request import Request, SamplingParams
from engine.batch import Chunk
from engine.config import EngineConfig
from engine.engine import Engine, LoadedModel
from engine.ops.expert_exchange import ExchangeShape, Tokens, expert_exchange
from engine.ops.moe_experts import moe_experts
from engine.parallel.expert_placement import ExpertPlacement, SlotChoice, even_placement
from engine.parallel.experts import Sharing
from engine.parallel.group import Group, Limits
from engine.runner import ModelRunner
from engine.sequence import Sequence
from tests.support.experts import EXPERTS, HIDDEN, LIMIT, SKEWED, packed, positions_of, reference_ops, tokens_of
from tests.support.ranks import LIMITS, run_group, seats


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("placement", "counts"),
    [
        (even_placement(8, 1), (5,)),
        (even_placement(8, 2), (7, 7)),
        (even_placement(8, 2), (0, 9)),
        (even_placement(8, 4), (1, 0, 30, 2)),
        (even_placement(8, 4), (0, 0, 0, 0)),
        (ExpertPlacement((7, 3, 1, 0, 6, 2, 5, 4), 2), (4, 6)),
        (SKEWED, (40, 3, 0, 11)),
        (even_placement(8, 3), (3, 4, 5)),
    ],
    ids=str,
)
def test_a_group_gives_the_bits_of_one_rank(placement: ExpertPlacement, counts: tuple[int, ...], dtype: torch.dtype) -> None:
    shape = ExchangeShape(hidden_size=HIDDEN, num_slots=len(placement.experts), max_tokens=64, is_latency_bound=True)

    def rank(group: Group) -> torch.Tensor:
        exchange = expert_exchange(group, shape, reference_ops())
        x, ids, weights = tokens_of(group.rank, counts[group.rank], dtype)
        arrived = exchange.dispatch(Tokens(x, ids, weights, positions_of(x), None), SlotChoice(placement, group.rank))
        assert arrived.x.dtype == dtype and arrived.ids.dtype == torch.int64 and arrived.weights.dtype == torch.float32
        rows = moe_experts(arrived.x, arrived.ids, arrived.weights, packed(placement.local(group.rank)), LIMIT, arrived.sum_dtype)
        return exchange.combine(rows, arrived)

    together = run_group(placement.num_ranks, rank)
    everything = packed(tuple(range(EXPERTS)))
    for number, routed in enumerate(together):
        alone = moe_experts(*tokens_of(number, counts[number], dtype), everything, LIMIT)
        assert routed.dtype == torch.float32 and torch.equal(routed, alone), f"rank {number}"


def test_places_without_an_expert_add_nothing() -> None:
    x, ids, weights = tokens_of(0, 6, torch.bfloat16)
    experts = packed(tuple(range(EXPERTS)))
    only = torch.where(ids < 4, ids, -1)
    assert torch.equal(
        moe_experts(x, only, weights, experts, LIMIT), moe_experts(x, only.clamp(min=0), weights * (only >= 0), experts, LIMIT)
    )
    assert not moe_experts(x, torch.full_like(ids, -1), weights, experts, LIMIT).any()


ENGINE = EngineConfig(device="cpu", max_model_len=1024)


def requests_of(rank: int, count: int) -> list[Request]:
    made = []
    for number in range(count):
        generator = torch.Generator().manual_seed(1000 * rank + number)
        ids = tuple(torch.randint(3, 500, (20 + 61 * number,), generator=generator).tolist())
        sampling = SamplingParams(max_tokens=5, temperature=float(number % 2), seed=number, ignore_eos=True)
        made.append(Request(request_id=f"{rank}.{number}", token_ids=ids, prompt_len=len(ids), sampling=sampling))
    return made


@pytest.mark.parametrize("counts", [(2, 2), (3, 0), (0, 1, 3, 2)], ids=str)
def test_a_model_in_a_group_gives_the_tokens_of_one_rank(small_checkpoint: pathlib.Path, counts: tuple[int, ...]) -> None:
    steps = 200

    def rank(group: Group) -> tuple[list[list[int]], int]:
        sharing = Sharing(group=group, max_tokens=64, is_latency_bound=False)
        loaded = LoadedModel.load(small_checkpoint, ENGINE, sharing)
        runner = ModelRunner(loaded, 32, 4)
        sequences = []
        for number, request in enumerate(requests_of(group.rank, counts[group.rank])):
            sequence = Sequence.from_request(request)
            sequence.page_ids, sequence.slot_id = list(range(4 * number, 4 * number + 4)), number
            runner.clear_slot(number)
            sequences.append(sequence)
        num_steps = 0
        for _ in range(steps):
            open_ones = [sequence for sequence in sequences if sequence.finish_reason is None]
            busy = group.exchange_counts(torch.full((group.size,), len(open_ones)))
            if not busy.any():
                break
            runner.step([Chunk(s, min(s.num_remaining, 64), "last" if s.num_remaining <= 64 else "none") for s in open_ones])
            num_steps += 1
        assert loaded.share is not None
        assert loaded.share.load().sum() == sum(s.num_computed for s in sequences) * 2 * 4  # experts a token, layers
        return [sequence.token_ids[sequence.request.prompt_len :] for sequence in sequences], num_steps

    together = run_group(len(counts), rank)
    assert len({num_steps for _, num_steps in together}) == 1
    engine = Engine(LoadedModel.load(small_checkpoint, ENGINE), num_pages=64, num_slots=8)
    for number, (tokens, _) in enumerate(together):
        assert tokens == [generation.token_ids for generation in engine.generate(requests_of(number, counts[number]))], f"rank {number}"


def test_a_rank_reads_only_its_experts_and_keeps_the_layouts_fingerprint(small_checkpoint: pathlib.Path) -> None:
    def rank(group: Group) -> tuple[set[str], str]:
        loaded = LoadedModel.load(small_checkpoint, ENGINE, Sharing(group=group, max_tokens=64, is_latency_bound=True))
        assert loaded.share is not None
        names = {f"layers.{layer}.ffn.experts.{expert}.w2.weight" for layer in range(4) for expert in range(4)}
        return set(filter(loaded.share.is_wanted, names)), loaded.layout.fingerprint()

    (first, one), (second, other) = run_group(2, rank)
    assert len(first) == len(second) == 8 and not first & second
    assert one == other == LoadedModel.load(small_checkpoint, ENGINE).layout.fingerprint()


def test_a_rank_that_leaves_is_noticed_at_once_by_the_others() -> None:
    left = threading.Event()

    def rank(group: Group) -> str:
        if group.rank == 1:
            group.close()
            left.set()
            return "gone"
        left.wait(20)
        with pytest.raises(GroupLost, match=r"decode/0\.\d: the group of 3 lost a rank, or .*, in the exchange of row counts"):
            group.exchange_counts(torch.zeros(3, dtype=torch.int64))
        return "noticed"

    assert run_group(3, rank) == ["noticed", "gone", "noticed"]


def test_a_rank_that_is_stuck_is_waited_for_no_longer_than_configured() -> None:
    is_over = threading.Event()

    def rank(group: Group) -> None:
        if group.rank == 1:
            is_over.wait(20)
            return
        with pytest.raises(GroupLost, match=r"waited over 0\.2 s"):
            group.exchange_counts(torch.zeros(2, dtype=torch.int64))
        is_over.set()

    run_group(2, rank, Limits(start_s=20.0, step_s=0.2))


def test_a_group_whose_ranks_do_not_come_is_given_up() -> None:
    rendezvous, places = seats(2)
    with pytest.raises(GroupLost, match=r"decode/0\.0: the group of 2 did not form within 0\.3 s"):
        Group.join(places[0], Limits(start_s=0.3, step_s=1.0), rendezvous)


def test_the_store_listens_on_its_host_only() -> None:
    rendezvous, _ = seats(1)
    port = int(rendezvous.address.rpartition(":")[2])
    listening = [
        line.split()[1]
        for table in ("/proc/net/tcp", "/proc/net/tcp6")
        for line in pathlib.Path(table).read_text().splitlines()[1:]
        if line.split()[3] == "0A" and int(line.split()[1].rpartition(":")[2], 16) == port
    ]
    assert listening == [f"0100007F:{port:04X}"]
    assert LIMITS.start_s > 0

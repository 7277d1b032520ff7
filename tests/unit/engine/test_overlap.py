"""Steps that are launched before the tokens of those before them are known give the same tokens, log-probabilities and ends."""

from __future__ import annotations

import dataclasses
import pathlib
import random
from typing import Any

import pytest
import torch

from core.errors import GroupLost, InternalError
from core.request import FinishReason, Request, SamplingParams
from engine.batch import Chunk
from engine.config import EngineConfig
from engine.engine import Engine, LoadedModel
from engine.graphs import DecodeGraphs
from engine.runner import ChunkResult, Launched
from engine.sequence import Sequence
from tests.support.eager_recorder import EagerGraph, EagerRecorder
from tests.support.null_runner import NullRunner

VOCAB = 512
SAMPLINGS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"seed": 7},
    {"temperature": 0.8, "top_p": 0.9, "top_k": 50, "seed": 2**63},
    {"temperature": 0.0, "num_logprobs": 2, "num_prompt_logprobs": 0},
]
HISTORIES: list[dict[str, Any]] = [
    {"presence_penalty": 0.5, "frequency_penalty": 0.3, "seed": 3},
    {"temperature": 0.0, "repetition_penalty": 1.3},
    {"temperature": 0.0, "logit_bias": ((9, 3.0),)},
    {"temperature": 0.0, "logit_bias": ((9, 4.0), (11, 4.1)), "frequency_penalty": 1.0, "num_logprobs": 1},
    {"repetition_penalty": 0.7, "frequency_penalty": -0.5, "top_p": 0.8, "seed": 11},
]


@pytest.fixture(scope="module")
def loaded(small_checkpoint: pathlib.Path) -> LoadedModel:
    return LoadedModel.load(small_checkpoint, EngineConfig(device="cpu", max_model_len=1024))


def overlapped(loaded: LoadedModel) -> LoadedModel:
    return dataclasses.replace(loaded, engine=dataclasses.replace(loaded.engine, overlap="on"))


def new_request(rng: random.Random, name: str, sampling: dict[str, Any], num_stops: int = 100) -> Request:
    length = rng.choice((1, 4, 9, 33, 127))
    ids = tuple(rng.randrange(2, VOCAB) for _ in range(length))
    stops = tuple(rng.sample(range(VOCAB), num_stops))  # some of what is drawn ends the sequence
    params = SamplingParams(max_tokens=rng.randint(1, 9), stop_token_ids=stops, ignore_eos=rng.random() < 0.5, **sampling)
    before = ids[:1] * rng.randrange(params.max_tokens)  # what it has produced elsewhere
    return Request(request_id=name, token_ids=ids + before, prompt_len=length, sampling=params)


class Watch:
    """Counts the steps of a runner that were launched with another one under way, and the rows of ended sequences."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.num_led = self.num_dropped = self._under_way = 0
        launch, collect = engine._runner.launch, engine._runner.collect

        def watched_launch(chunks: list[Chunk], budget: int = 0) -> Launched:
            self.num_led += self._under_way
            self._under_way += 1
            assert self._under_way <= 2
            return launch(chunks, budget)

        def watched_collect(launched: Launched) -> list[ChunkResult]:
            results = collect(launched)
            self._under_way -= 1
            self.num_dropped += len(launched.chunks) - len(results)
            return results

        monkeypatch.setattr(engine._runner, "launch", watched_launch)
        monkeypatch.setattr(engine._runner, "collect", watched_collect)


def test_tokens_and_ends_are_those_of_steps_one_at_a_time(loaded: LoadedModel, rng: random.Random, monkeypatch: pytest.MonkeyPatch) -> None:
    num_led, num_dropped, ends = 0, 0, set[FinishReason | None]()
    for schedule in range(3):
        requests = [new_request(rng, f"r{n}", rng.choice(SAMPLINGS + HISTORIES)) for n in range(6)]
        sizes = {"num_pages": rng.randint(4, 12), "num_slots": 6, "max_running": rng.randint(2, 6), "chunk_tokens": rng.choice((40, 256))}
        expected = Engine(loaded, **sizes).generate(requests)
        engine = Engine(overlapped(loaded), **sizes)
        watch = Watch(engine, monkeypatch)
        assert engine.generate(requests) == expected, f"{schedule=}"
        num_led, num_dropped = num_led + watch.num_led, num_dropped + watch.num_dropped
        ends |= {generation.finish_reason for generation in expected}
    assert num_led > 10 and num_dropped > 0 and ends == {FinishReason.STOP, FinishReason.LENGTH}, f"{num_led=} {num_dropped=}"


def test_who_depends_on_the_tokens_before_is_launched_before_they_are_known(
    loaded: LoadedModel, rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [new_request(rng, f"r{n}", sampling, num_stops=0) for n, sampling in enumerate(HISTORIES)]
    sizes = {"num_pages": 10, "num_slots": 5}
    for engine in (Engine(overlapped(loaded), **sizes), with_graphs(Engine(overlapped(loaded), **sizes))):
        watch = Watch(engine, monkeypatch)
        assert engine.generate(requests) == Engine(loaded, **sizes).generate(requests)
        assert watch.num_led > 3


class LostShare:
    """A group that has lost a rank in the step."""

    def begin_step(self, rows: int) -> None:
        """It begins as any other."""

    def check(self) -> None:
        raise GroupLost("decode/0.0: a rank did not answer")


@pytest.mark.parametrize("overlap", ["on", "off"])
def test_what_ended_without_a_rank_is_the_groups_loss_and_no_token(
    loaded: LoadedModel, overlap: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drawn by the device, or by the host."""
    share: Any = LostShare()
    model = dataclasses.replace(loaded, share=share, engine=dataclasses.replace(loaded.engine, overlap=overlap))
    engine = with_graphs(Engine(model, num_pages=2, num_slots=1))
    forward = loaded.network.forward
    monkeypatch.setattr(loaded.network, "forward", lambda *arguments: forward(*arguments) * float("nan"))
    request = new_request(random.Random(1), "lost", SAMPLINGS[0])
    sequence = Sequence.from_request(request)
    sequence.page_ids, sequence.slot_id, sequence.num_computed = [0], 0, len(request.token_ids) - 1
    with pytest.raises(GroupLost):
        engine._runner.step([Chunk(sequence, 1)])
    assert sequence.token_ids == list(request.token_ids), "no token is taken"


def with_graphs(engine: Engine) -> Engine:
    """Decode steps go the way of a GPU's, but for the recording."""
    runner = engine._runner
    runner._graphs = DecodeGraphs(engine.loaded.network, runner._caches, [1, 4, 6], [32], engine.loaded.device_sample, EagerRecorder())
    return engine


def test_tokens_that_the_device_draws_and_feeds_on_are_those_of_the_host(
    loaded: LoadedModel, rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [new_request(rng, f"r{n}", (SAMPLINGS + HISTORIES)[n % 9], num_stops=30) for n in range(18)]
    sizes = {"num_pages": 12, "num_slots": 6, "max_running": 6, "chunk_tokens": 256}
    engine = with_graphs(Engine(overlapped(loaded), **sizes))
    watch, drawn = Watch(engine, monkeypatch), list[int]()
    draw = DecodeGraphs.draw
    monkeypatch.setattr(DecodeGraphs, "draw", lambda self, *args: (drawn.append(sum(row >= 0 for row in args[2])), draw(self, *args))[1])
    for some in (requests[:12], requests[6:]):
        assert engine.generate(some) == Engine(loaded, **sizes).generate(some)
    assert sum(drawn) > 3 and watch.num_led > 2, f"{drawn=} {watch.num_led=}"


def test_a_drawn_token_of_logits_that_are_not_finite_fails_its_request_and_no_other(loaded: LoadedModel) -> None:
    engine = with_graphs(Engine(overlapped(loaded), num_pages=2, num_slots=2))
    sequences = []
    for number, name in enumerate(("sound", "poisoned")):
        sequence = Sequence.from_request(Request(request_id=name, token_ids=(5,), prompt_len=1, sampling=SamplingParams(max_tokens=9)))
        sequence.page_ids, sequence.slot_id = [number], number
        engine._runner.clear_slot(number)
        sequences.append(sequence)
    graphs = engine._runner._graphs
    assert graphs is not None
    for size, width in graphs._graphs:
        graphs._graphs[size, width] = EagerGraph(lambda: (graphs._logits.fill_(0.0), graphs._logits[1].fill_(torch.nan)))  # type: ignore
    launched = engine._runner.launch([Chunk(sequence, 1) for sequence in sequences])
    led = engine._runner.launch([Chunk(sequence, 1) for sequence in sequences])
    assert led.drawn is not None and graphs._inputs[:1, :2].min() >= 0
    for number, step in enumerate((launched, led)):
        sound, poisoned = engine._runner.collect(step)
        assert sound.token is not None and sound.error is None and len(sequences[0].token_ids) == number + 2
        assert poisoned.token is None and isinstance(poisoned.error, InternalError) and "of poisoned are" in str(poisoned.error)
    assert len(sequences[1].token_ids) == 1


def test_a_step_launched_for_an_ended_sequence_gives_it_nothing() -> None:
    runner = NullRunner(num_pages=1, num_slots=1, overlap=True)
    request = Request(request_id="r", token_ids=(5, 6, 7), prompt_len=3, sampling=SamplingParams(max_tokens=9, ignore_eos=True))
    first = runner.next_token([5, 6, 7], request.sampling)
    stopping = dataclasses.replace(request, sampling=dataclasses.replace(request.sampling, stop_token_ids=(first,)))
    sequence = Sequence.from_request(stopping)
    sequence.page_ids, sequence.slot_id = [0], 0
    runner.clear_slot(0)
    one = runner.launch([Chunk(sequence, 3)])
    two = runner.launch([Chunk(sequence, 1)])
    (result,) = runner.collect(one)
    assert result.token == first and sequence.finish_reason is FinishReason.STOP
    assert runner.collect(two) == [] and sequence.token_ids == [5, 6, 7, first]

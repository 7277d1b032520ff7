"""Decode steps on a GPU with nothing of the host in between: the tokens are those of the host's sampler, each step takes in those of the
step before, and nothing is waited for or allocated."""

from __future__ import annotations

import pathlib
import random
import warnings
from typing import Any

import pytest
import torch

from core.request import Request, SamplingParams
from engine.batch import Chunk
from engine.config import EngineConfig
from engine.engine import LoadedModel
from engine.runner import Launched, ModelRunner
from engine.sampler import sample
from engine.sequence import Sequence

pytestmark = pytest.mark.gpu

MODEL = pathlib.Path(__file__).resolve().parents[2] / "deploy" / "demo_model" / "checkpoint"
SAMPLINGS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"seed": 7},
    {"temperature": 0.8, "top_p": 0.9, "top_k": 50, "seed": 2**63},
    {"temperature": 1.3, "min_p": 0.02, "seed": 3},
    {"temperature": 0.0, "num_logprobs": 2},
    {"frequency_penalty": 0.7, "presence_penalty": 0.4, "seed": 4},
    {"temperature": 0.0, "repetition_penalty": 1.2},
    {"temperature": 0.9, "top_p": 0.95, "logit_bias": ((9, 5.0), (300, 5.0)), "frequency_penalty": 0.3, "seed": 5},
]
PAGES = 4


def decoding(runner: ModelRunner, samplings: list[dict[str, Any]], rng: random.Random) -> list[Sequence]:
    """Sequences whose prompts are computed, and that go on for long."""
    found = []
    for number, sampling in enumerate(samplings):
        ids = tuple(rng.randrange(2, runner.vocab_size) for _ in range(rng.randint(3, 200)))
        params = SamplingParams(max_tokens=500, ignore_eos=True, **sampling)
        sequence = Sequence.from_request(Request(request_id=f"r{number}", token_ids=ids, prompt_len=len(ids), sampling=params))
        sequence.slot_id, sequence.page_ids = number, list(range(number * PAGES, (number + 1) * PAGES))
        runner.clear_slot(number)
        runner.step([Chunk(sequence, len(ids))])
        found.append(sequence)
    return found


@pytest.fixture(scope="module")
def runner() -> ModelRunner:
    loaded = LoadedModel.load(MODEL, EngineConfig(device="cuda", threads=8, max_model_len=4096))
    return ModelRunner(loaded, num_pages=8 * PAGES, num_slots=8, max_decode=8)


def check_tokens_and_feedback(runner: ModelRunner, rng: random.Random, num_steps: int) -> None:
    """Each step is launched before the one before it is collected; every now and then the rows change places."""
    sequences = decoding(runner, SAMPLINGS, rng)
    graphs, arena = runner._graphs, runner.arena
    assert graphs is not None
    before: tuple[Launched, torch.Tensor] | None = None
    for step in range(num_steps):
        order = rng.sample(sequences, rng.randint(2, len(sequences)) if step % 3 == 0 else len(sequences))
        if before is not None:
            known = {chunk.sequence.request_id for chunk in before[0].chunks}
            order = [sequence for sequence in order if sequence.request_id in known or sequence.num_remaining == 1]
        chunks = [Chunk(sequence, 1) for sequence in order]
        state = arena.slots.clone(), arena.pages.clone()
        launched = runner.launch(chunks)
        logits = graphs._logits[: len(chunks)].clone()
        assert runner.may_lead(launched)
        if before is not None:
            collected, its_logits = before
            expected = sample(its_logits.cpu(), [chunk.sequence for chunk in collected.chunks])
            results = runner.collect(collected)
            assert [result.token for result in results] == expected, f"{step=}"
            assert all((r.logprobs is None) == (r.sequence.request.sampling.num_logprobs is None) for r in results)
            # The same step again, with tokens that the host knows by now, from the same state.
            arena.slots.copy_(state[0])
            arena.pages.copy_(state[1])
            assert torch.equal(graphs.run(chunks), logits), f"{step=}: another token was taken in"
        before = launched, logits
    assert before is not None
    runner.collect(before[0])
    assert len({tuple(sequence.token_ids[-5:]) for sequence in sequences}) == len(sequences)


def test_tokens_drawn_by_the_device_are_the_samplers_and_feed_the_next_step(runner: ModelRunner, rng: random.Random) -> None:
    check_tokens_and_feedback(runner, rng, 60)


def test_steady_decode_waits_for_nothing_and_allocates_nothing(runner: ModelRunner, rng: random.Random) -> None:
    sequences = decoding(runner, SAMPLINGS[:4] + SAMPLINGS[5:], rng)
    before = runner.launch([Chunk(sequence, 1) for sequence in sequences])

    def steps(count: int) -> None:
        nonlocal before
        for _ in range(count):
            launched = runner.launch([Chunk(sequence, 1) for sequence in sequences])
            assert len(runner.collect(before)) == len(sequences)
            before = launched

    steps(10)
    stats = torch.cuda.memory_stats()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode("error")
    try:
        steps(100)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    after = torch.cuda.memory_stats()
    for name in ("allocation.all.allocated", "segment.all.allocated", "num_alloc_retries"):
        assert after[name] == stats[name], f"{name}: {after[name] - stats[name]} more in 100 steps"
    runner.collect(before)

"""Sampling with parameters in tensors gives the tokens of the sampler on the host."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch

from core.request import Request, SamplingParams
from engine.ops.sample import sample as sample_op
from engine.sampler import draws_of, sample
from engine.sequence import Sequence

VOCAB = 700

CHOICES: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {},
    {"temperature": 0.4},
    {"top_k": 20},
    {"top_k": 10_000},
    {"top_p": 0.9, "temperature": 1.3},
    {"top_p": 1e-9},
    {"min_p": 0.05},
    {"top_k": 30, "top_p": 0.7, "min_p": 0.1, "temperature": 2.0},
    {"temperature": 0.0, "logit_bias": ((5, 30.0), (7, 31.0))},
    {"logit_bias": ((9, 8.0),), "top_k": 3},
    {"presence_penalty": 0.5, "frequency_penalty": 0.5},
    {"repetition_penalty": 1.7, "temperature": 0.0},
    {"repetition_penalty": 0.8, "top_p": 0.95, "presence_penalty": -1.0},
]
GROUPS = {"plain": CHOICES[:3], "filters": CHOICES[:9], "everything": CHOICES}


def sequence(rng: random.Random, sampling: dict[str, Any]) -> Sequence:
    token_ids = tuple(rng.randrange(VOCAB) for _ in range(rng.randrange(3, 40)))
    params = SamplingParams(max_tokens=100, seed=rng.getrandbits(64), **sampling)
    return Sequence.from_request(Request(request_id="r", token_ids=token_ids, prompt_len=rng.randrange(1, len(token_ids)), sampling=params))


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("rounded", [False, True], ids=["", "ties"])
def test_tokens_are_those_of_the_host(group: str, rounded: bool, rng: random.Random) -> None:
    sequences = [sequence(rng, rng.choice(GROUPS[group])) for _ in range(200)]
    logits = torch.randn(200, VOCAB, generator=torch.Generator().manual_seed(rng.randrange(2**31))) * 2
    if rounded:
        logits.round_()
    draws = draws_of(sequences, VOCAB, "cpu")
    assert (draws.filters is None, draws.penalties is None, draws.bias is None) == tuple(
        group in names for names in (("plain",), ("plain", "filters"), ("plain", "filters"))
    )
    tokens = sample_op(logits, draws).tolist()
    assert tokens == sample(logits, sequences)
    assert len(set(tokens)) > 20


def test_a_row_that_is_not_finite_gives_minus_one(rng: random.Random) -> None:
    logits = torch.zeros(5, VOCAB)
    logits[1, 3], logits[2, 9], logits[3] = math.nan, math.inf, -math.inf
    logits[4, :-1] = -math.inf
    draws = draws_of([sequence(rng, {}) for _ in range(5)], VOCAB, "cpu")
    tokens = sample_op(logits, draws).tolist()
    assert tokens[0] >= 0 and tokens[1:] == [-1, -1, -1, VOCAB - 1]


def test_penalties_follow_the_output(rng: random.Random) -> None:
    one = sequence(rng, {"frequency_penalty": 1.5, "repetition_penalty": 1.2})
    draws = draws_of([one], VOCAB, "cpu")
    assert draws.penalties is not None
    for token in (4, 4, 650):
        draws.penalties.add(torch.tensor([token]))
        one.token_ids.append(token)
    expected = draws_of([one], VOCAB, "cpu").penalties
    assert expected is not None
    assert torch.equal(draws.penalties.counts, expected.counts) and torch.equal(draws.penalties.seen, expected.seen)
    assert draws.penalties.counts[0, 4] >= 2


@pytest.mark.gpu
@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_scores_too_near_to_tell_in_fp32_are_decided_exactly(temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    import engine.ops.sample.triton as backend
    from engine.ops.sample import Draws

    device = torch.device("cuda")
    generator = torch.Generator(device).manual_seed(3)
    logits = torch.randn(64, 129_280, generator=generator, device=device) * 3
    rows = torch.arange(64, device=device)
    draws = Draws(torch.full((64,), temperature, dtype=torch.float64, device=device), rows * 7_777_777, rows)
    expected = sample_op(logits, draws)
    assert torch.equal(backend.run(logits, draws), expected)
    monkeypatch.setattr(backend, "SLACK", 1e6)
    assert torch.equal(backend.run(logits, draws), expected)


@pytest.mark.gpu
def test_sampling_is_captured_in_a_graph() -> None:
    from engine.ops.sample.triton import run

    device = torch.device("cuda")
    rng = random.Random(1)
    for group in GROUPS.values():
        sequences = [sequence(rng, rng.choice(group)) for _ in range(16)]
        logits = torch.randn(16, VOCAB, device=device)
        draws = draws_of(sequences, VOCAB, device)
        run(logits, draws)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            tokens = run(logits, draws)
        logits.copy_(torch.randn(16, VOCAB, device=device))
        draws.position.add_(1)
        graph.replay()
        assert torch.equal(tokens, sample_op(logits, draws))

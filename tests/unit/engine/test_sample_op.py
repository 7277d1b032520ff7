"""Sampling with parameters in tensors gives the tokens of the sampler on the host."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch

from core.request import Request, SamplingParams
from engine.histories import terms_of, words_of
from engine.ops.sample import COUNT_MASK, Draws, Filters, Histories, masses
from engine.ops.sample import sample as sample_op
from engine.sampler import has_filters, needs_history, sample, signed
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


def draws_of(sequences: list[Sequence], device: torch.device | str = "cpu") -> tuple[Draws, Histories | None]:
    """What the op needs to give each sequence the token that the sampler gives it. Slots are the rows in reverse."""
    params = [sequence.request.sampling for sequence in sequences]

    def column(values: list[Any], dtype: torch.dtype = torch.float64) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    filters = slot = histories = None
    if any(has_filters(p) for p in params):
        filters = Filters(
            column([p.top_k for p in params], torch.int64), column([p.top_p for p in params]), column([p.min_p for p in params])
        )
    if any(needs_history(p) for p in params):
        slot = column([len(params) - 1 - row if needs_history(p) else -1 for row, p in enumerate(params)], torch.int64)
        words = torch.full((len(params), VOCAB), 77, dtype=torch.int32, device=device)  # of nobody
        terms = torch.full((len(params), len(terms_of(params[0]))), torch.nan, dtype=torch.float64, device=device)
        histories = Histories(words, terms)
        for row, sequence in enumerate(sequences):
            if needs_history(params[row]):
                histories.words[-1 - row] = torch.from_numpy(words_of(sequence, len(sequence.token_ids), VOCAB))
                histories.terms[-1 - row] = torch.from_numpy(terms_of(params[row]))
    seeds, positions = (
        column(values, torch.int64) for values in ([signed(p.seed) for p in params], [len(sequence.token_ids) for sequence in sequences])
    )
    return Draws(column([p.temperature for p in params]), seeds, positions, filters, slot), histories


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("rounded", [False, True], ids=["", "ties"])
def test_tokens_are_those_of_the_host(group: str, rounded: bool, rng: random.Random) -> None:
    sequences = [sequence(rng, rng.choice(GROUPS[group])) for _ in range(200)]
    logits = torch.randn(200, VOCAB, generator=torch.Generator().manual_seed(rng.randrange(2**31))) * 2
    if rounded:
        logits.round_()
    draws, histories = draws_of(sequences)
    assert (draws.filters is None, histories is None) == (group == "plain", group in ("plain", "filters"))
    tokens = sample_op(logits, draws, histories).tolist()
    assert tokens == sample(logits, sequences)
    assert len(set(tokens)) > 20


def test_a_row_that_is_not_finite_gives_minus_one(rng: random.Random) -> None:
    logits = torch.zeros(5, VOCAB)
    logits[1, 3], logits[2, 9], logits[3] = math.nan, math.inf, -math.inf
    logits[4, :-1] = -math.inf
    for sampling in CHOICES[1], CHOICES[-3]:
        tokens = sample_op(logits, *draws_of([sequence(rng, sampling) for _ in range(5)])).tolist()
        assert tokens[0] >= 0 and tokens[1:] == [-1, -1, -1, VOCAB - 1]


def test_a_token_that_is_drawn_is_counted_for_the_next_draw(rng: random.Random) -> None:
    sequences = [sequence(rng, rng.choice(CHOICES)) for _ in range(40)]
    draws, histories = draws_of(sequences)
    assert histories is not None
    num_repeated = 0
    for _ in range(12):
        logits = torch.randn(40, VOCAB, generator=torch.Generator().manual_seed(rng.randrange(2**31)))
        logits[:, :20] += 6  # some of few
        tokens = sample_op(logits, draws, histories).tolist()
        assert tokens == sample(logits, sequences)
        for one, token in zip(sequences, tokens, strict=True):
            num_repeated += token in one.token_ids[one.request.prompt_len :] and needs_history(one.request.sampling)
            one.token_ids.append(token)
        draws.position.add_(1)
        expected = draws_of(sequences)[1]
        assert expected is not None and torch.equal(histories.words, expected.words)
    assert num_repeated > 20


def test_a_token_on_its_way_counts_for_the_sampler_of_the_host(rng: random.Random) -> None:
    sequences, logits = [sequence(rng, rng.choice(CHOICES)) for _ in range(60)], torch.zeros(60, VOCAB)
    fed = [rng.randrange(VOCAB) if rng.random() < 0.7 else -1 for _ in sequences]
    ahead = sample(logits, sequences, fed)
    for one, token in zip(sequences, fed, strict=True):
        one.token_ids += [token] if token >= 0 else []
    assert sample(logits, sequences) == ahead


def test_words_hold_the_longest_output_and_every_bias(rng: random.Random) -> None:
    bias = tuple((token, float(token)) for token in rng.sample(range(VOCAB), VOCAB))
    one = sequence(rng, {"temperature": 0.0, "logit_bias": bias, "repetition_penalty": 2.0})
    draws, histories = draws_of([one])
    assert histories is not None
    top = bias[-1][0]
    histories.words[0, top] |= COUNT_MASK - int(histories.words[0, top] & COUNT_MASK) - 1
    logits = torch.zeros(1, VOCAB)
    logits[0, top] = 10_000.0
    assert sample_op(logits, draws, histories).tolist() == [top]
    assert int(histories.words[0, top] & COUNT_MASK) == COUNT_MASK
    expected = torch.tensor([dict(bias)[token] for token in range(VOCAB)], dtype=torch.float64)
    assert [int(word >> 21) & 0x7FF for word in histories.words[0]] == [[t for t, _ in bias].index(token) + 1 for token in range(VOCAB)]
    assert torch.equal(histories.terms[0, 3 : 3 + VOCAB][((histories.words[0] >> 21) & 0x7FF).long() - 1], expected)


def test_what_penalties_make_of_a_logit_never_leaves_fp32(rng: random.Random) -> None:
    one = sequence(rng, {"temperature": 0.7, "repetition_penalty": 1e-300, "frequency_penalty": -2.0})
    draws, histories = draws_of([one])
    logits = torch.randn(1, VOCAB)
    logits[0, 5] = -math.inf
    assert sample_op(logits, draws, histories).tolist() == sample(logits, [one])


def test_masses_are_likelihoods() -> None:
    logits = torch.randn(4, 5000, generator=torch.Generator().manual_seed(2)) * 5
    logits[:, 7] = -math.inf
    temperature = torch.tensor([1.0, 0.3, 2.0, 1e-300], dtype=torch.float64)[:, None]
    values = logits.double()
    expected = torch.exp((values - values.amax(dim=1, keepdim=True)) / temperature)
    assert torch.allclose(masses(logits, temperature).double() / 2.0**30, expected, rtol=2e-6, atol=2.0**-31)
    assert masses(logits, temperature)[3].tolist() == (logits[3] == logits[3].max()).long().mul(2**30).tolist()


def test_of_ten_equal_tokens_nine_reach_nine_tenths() -> None:
    logits = torch.full((2000, VOCAB), -100.0)
    logits[:, 20:30] = 0.0
    zero, rows = torch.zeros(2000, dtype=torch.int64), torch.arange(2000)
    ones = torch.ones(2000, dtype=torch.float64)
    tokens = sample_op(logits, Draws(ones, zero, rows, Filters(None, 0.9 * ones, None)))
    assert set(tokens.tolist()) == set(range(20, 29))


@pytest.mark.gpu
@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_scores_too_near_to_tell_in_fp32_are_decided_exactly(temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    import engine.ops.sample.triton as backend

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
        draws, histories = draws_of(sequences, device)
        run(logits, draws, histories)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            tokens = run(logits, draws, histories)
        logits.copy_(torch.randn(16, VOCAB, device=device))
        draws.position.add_(1)
        copied = None if histories is None else Histories(histories.words.clone(), histories.terms)
        graph.replay()
        assert torch.equal(tokens, sample_op(logits, draws, copied))
        assert histories is None or copied is None or torch.equal(histories.words, copied.words)

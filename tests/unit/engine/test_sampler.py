from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch

import engine.sampler
from core.request import Request, SamplingParams
from engine.logprobs import logprobs_of
from engine.sampler import sample
from engine.sequence import Sequence

NUM_DRAWS = 10_000


def sequence(prompt: list[int] | None = None, output: list[int] | None = None, name: str = "r", **sampling: Any) -> Sequence:
    prompt, output = prompt or [0], output or []
    params = SamplingParams(**({"max_tokens": 100} | sampling))
    return Sequence.from_request(Request(request_id=name, token_ids=(*prompt, *output), prompt_len=len(prompt), sampling=params))


def one(logits: list[float], **sampling: Any) -> int:
    prompt, output = sampling.pop("prompt", None), sampling.pop("output", None)
    return sample(torch.tensor([logits]), [sequence(prompt, output, **sampling)])[0]


def exact(logits: torch.Tensor, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> list[float]:
    """The distribution by its definition, in plain Python."""
    weights = [math.exp(value / temperature) for value in logits.tolist()]
    order = sorted(range(len(weights)), key=lambda token: (-weights[token], token))
    if top_k:
        order = order[:top_k]
    total, kept, reached = sum(weights[token] for token in order), [], 0.0
    for token in order:
        if reached >= top_p * total:
            break
        kept.append(token)
        reached += weights[token]
    kept = [token for token in kept if weights[token] >= min_p * weights[order[0]]]
    mass = sum(weights[token] for token in kept)
    return [weights[token] / mass if token in kept else 0.0 for token in range(len(weights))]


def chi_square_limit(degrees: int) -> float:
    """Upper 1e-6 quantile, by Wilson and Hilferty's cube."""
    return degrees * (1 - 2 / (9 * degrees) + 4.7534 * math.sqrt(2 / (9 * degrees))) ** 3


def assert_drawn_from(tokens: list[int], expected: list[float]) -> None:
    counts = torch.bincount(torch.tensor(tokens), minlength=len(expected)).tolist()
    impossible = [token for token, p in enumerate(expected) if p == 0 and counts[token]]
    assert not impossible, f"tokens {impossible} were drawn"
    possible = [token for token, p in enumerate(expected) if p > 0]
    value = sum((counts[t] - len(tokens) * expected[t]) ** 2 / (len(tokens) * expected[t]) for t in possible)
    assert value < chi_square_limit(max(1, len(possible) - 1)), f"{value=} {counts=}"


LOGITS = torch.tensor([1.0, 0.3, -0.5, 2.0, 2.0, -1.5, 0.0, 0.9, 1.4, -0.2, 0.6])


@pytest.mark.parametrize(
    "filters",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.5},
        {"top_k": 1},
        {"top_k": 4},
        {"top_k": 1000},
        {"top_p": 0.6},
        {"top_p": 1e-6},
        {"min_p": 0.3},
        {"min_p": 1.0},
        {"temperature": 1.7, "top_k": 7, "top_p": 0.8, "min_p": 0.1},
    ],
    ids=str,
)
def test_draws_follow_the_exact_distribution(filters: dict[str, Any]) -> None:
    sequences = [sequence(seed=seed, **filters) for seed in range(NUM_DRAWS)]
    assert_drawn_from(sample(LOGITS.expand(NUM_DRAWS, -1), sequences), exact(LOGITS, **filters))


def test_draws_of_one_seed_are_independent_from_position_to_position() -> None:
    sequences = [sequence([0] * position, seed=12345) for position in range(1, 4001)]
    tokens = sample(LOGITS[:4].expand(len(sequences), -1), sequences)
    p = exact(LOGITS[:4])
    assert_drawn_from(tokens, p)
    pairs = [4 * first + second for first, second in zip(tokens[::2], tokens[1::2], strict=True)]
    assert_drawn_from(pairs, [p[i] * p[j] for i in range(4) for j in range(4)])


def test_result_does_not_depend_on_the_batch(rng: random.Random) -> None:
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    logits = torch.randn(24, 999, generator=generator) * 3
    choices: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 0.9},
        {"top_k": 20},
        {"top_p": 0.9, "temperature": 1.3},
        {"min_p": 0.05},
        {"temperature": 0.0, "logit_bias": ((5, 3.0),)},
        {"presence_penalty": 0.5, "frequency_penalty": 0.5, "repetition_penalty": 1.2, "top_p": 0.95},
    ]
    sequences = [
        sequence([rng.randrange(999) for _ in range(9)], [rng.randrange(999) for _ in range(row)], seed=row, **choices[row % len(choices)])
        for row in range(24)
    ]
    alone = [sample(logits[row : row + 1], [sequences[row]])[0] for row in range(24)]
    assert sample(logits, sequences) == alone
    order = list(range(24))
    for _ in range(5):
        rng.shuffle(order)
        part = order[: rng.randint(1, 24)]
        assert sample(logits[part], [sequences[row] for row in part]) == [alone[row] for row in part]


def test_memory_for_a_step_does_not_grow_with_its_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    choose = engine.sampler._choose
    monkeypatch.setattr(engine.sampler, "_choose", lambda logits, *others: (rows.append(len(logits)), choose(logits, *others))[1])
    assert len(sample(torch.zeros(70, 8), [sequence(seed=row) for row in range(70)])) == 70
    assert sum(rows) == 70 and max(rows) <= 16


@pytest.mark.gpu
def test_tokens_are_the_same_on_a_gpu() -> None:
    logits = torch.randn(64, 5000, generator=torch.Generator().manual_seed(0)) * 3
    choices: list[dict[str, Any]] = [{"temperature": 0.0}, {}, {"top_p": 0.9}, {"top_k": 40, "min_p": 0.01}, {"repetition_penalty": 1.3}]
    sequences = [sequence([1, 2, 3], [4, 5], seed=row, **choices[row % len(choices)]) for row in range(64)]
    assert sample(logits.cuda(), sequences) == sample(logits, sequences)


def test_a_small_change_of_logits_rarely_changes_the_token() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2000, 300, generator=generator)
    nudged = logits + 1e-3 * torch.randn(2000, 300, generator=generator)
    sequences = [sequence(seed=seed) for seed in range(2000)]
    changed = sum(a != b for a, b in zip(sample(logits, sequences), sample(nudged, sequences), strict=True))
    assert changed < 20


def test_logits_are_left_as_they_are() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(1))
    before = logits.clone()
    sample(logits, [sequence(top_k=3), sequence(logit_bias=((1, 5.0),)), sequence(temperature=0.0, repetition_penalty=2.0)])
    assert torch.equal(logits, before)


class TestGreedy:
    def test_lowest_id_wins_ties(self) -> None:
        assert one([0.0, 2.0, 1.0, 2.0, 2.0], temperature=0.0) == 1

    def test_lowest_id_wins_ties_in_a_wide_row(self) -> None:
        logits = torch.zeros(2, 130_000)
        logits[:, [70_001, 99_999]] = 1.0
        assert sample(logits, [sequence(temperature=0.0), sequence(temperature=0.0, logit_bias=((0, 0.5),))]) == [70_001, 70_001]

    def test_seed_does_not_matter(self) -> None:
        assert {one([0.0, 0.1, 0.05], temperature=0.0, seed=seed) for seed in range(50)} == {1}

    @pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-300])
    def test_tiny_temperature_is_nearly_greedy_and_never_overflows(self, temperature: float) -> None:
        assert {one([-30.0, 40.0, 39.0], temperature=temperature, seed=seed) for seed in range(50)} == {1}

    @pytest.mark.parametrize("broken", [math.nan, math.inf])
    def test_broken_logits_give_no_token_and_change_no_other(self, broken: float) -> None:
        logits = torch.zeros(3, 8)
        logits[1, 3] = logits[2, 3] = broken
        sampled = sample(logits, [sequence(name="good"), sequence(name="bad"), sequence(temperature=0.0)])
        assert sampled == [*sample(logits[:1], [sequence(name="good")]), -1, -1]


class TestPenalties:
    def test_bias_adds_to_its_token(self) -> None:
        assert one([0.0, 1.0, 0.0], temperature=0.0, logit_bias=((2, 1.5),)) == 2
        assert one([0.0, 1.0, 0.5], temperature=0.0, logit_bias=((1, -1.0),)) == 2

    def test_presence_counts_output_once_and_not_the_prompt(self) -> None:
        assert one([1.0, 0.0], prompt=[0, 0], temperature=0.0, presence_penalty=1.5) == 0
        assert one([1.0, 0.0], prompt=[1], output=[0], temperature=0.0, presence_penalty=1.5) == 1
        assert one([2.0, 0.0], prompt=[1], output=[0, 0, 0], temperature=0.0, presence_penalty=1.5) == 0

    def test_frequency_counts_every_occurrence_in_the_output(self) -> None:
        assert one([2.0, 0.0], prompt=[0], output=[0], temperature=0.0, frequency_penalty=0.7) == 0
        assert one([2.0, 0.0], prompt=[0], output=[0, 0, 0], temperature=0.0, frequency_penalty=0.7) == 1

    def test_repetition_counts_prompt_and_output_and_pushes_down_either_sign(self) -> None:
        assert one([1.0, 0.8], prompt=[0], temperature=0.0, repetition_penalty=1.5) == 1
        assert one([-1.0, -1.2], prompt=[0], temperature=0.0, repetition_penalty=1.5) == 1
        assert one([1.0, 0.8, 0.7], prompt=[0], output=[1], temperature=0.0, repetition_penalty=1.5) == 2

    def test_penalties_come_before_the_filters(self) -> None:
        drawn = {one([1.0, 0.9, -9.0], prompt=[2], output=[0], presence_penalty=5.0, top_k=1, seed=seed) for seed in range(20)}
        assert drawn == {1}


class TestLogprobs:
    def test_they_are_those_of_the_plain_softmax(self) -> None:
        (result,) = logprobs_of(LOGITS[None], [6], 3)
        p = exact(LOGITS)
        assert result.logprob == pytest.approx(math.log(p[6]), abs=1e-12)
        assert result.top_ids == (3, 4, 8)  # 3 and 4 are equal
        assert result.top_logprobs == pytest.approx([math.log(p[token]) for token in (3, 4, 8)], abs=1e-12)

    def test_no_alternatives_and_more_than_there_are(self) -> None:
        none, every = (logprobs_of(LOGITS[None], [6], count)[0] for count in (0, 99))
        assert none.top_ids == () and none.logprob == every.logprob
        assert sorted(every.top_ids) == list(range(len(LOGITS)))

    def test_each_row_has_its_own_target(self) -> None:
        logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(3))
        results = logprobs_of(logits, [1, 2, 3, 4, 5], 2)
        assert [result.logprob for result in results] == [logprobs_of(logits[i : i + 1], [i + 1], 0)[0].logprob for i in range(5)]
        assert logprobs_of(logits[:0], [], 2) == ()

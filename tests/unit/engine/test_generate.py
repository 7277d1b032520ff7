"""The same tokens whatever else is in the batch, however prompts are cut, and from wherever a request goes on."""

from __future__ import annotations

import dataclasses
import pathlib
import random
from typing import Any

import numpy as np
import pytest
import torch

from core.errors import BatonError, ConfigError, InternalError, InvalidRequest
from core.request import FinishReason, Request, SamplingParams
from engine.batch import Chunk
from engine.config import EngineConfig
from engine.engine import Engine, Generation, LoadedModel
from engine.memory_plan import MemoryPlan, available_bytes, tensor_bytes
from engine.model.prompts import ENTRIES_AT_ONCE
from engine.runner import ModelRunner
from engine.score import score
from engine.sequence import Sequence

VOCAB = 512
LENGTHS = [1, 3, 4, 5, 127, 128, 129, 255, 256, 257, 385, 520]
SAMPLINGS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0, "seed": 7},
    {"temperature": 0.8, "top_p": 0.9, "top_k": 50, "seed": 2**63},
    {"temperature": 1.2, "min_p": 0.02, "presence_penalty": 0.5, "frequency_penalty": 0.3, "repetition_penalty": 1.1, "seed": 3},
]


@pytest.fixture(scope="module")
def loaded(small_checkpoint: pathlib.Path) -> LoadedModel:
    return LoadedModel.load(small_checkpoint, EngineConfig(device="cpu", max_model_len=1024))


def new_engine(loaded: LoadedModel, **sizes: int) -> Engine:
    return Engine(loaded, **({"num_pages": 48, "num_slots": 16, "max_running": 16, "chunk_tokens": 256} | sizes))


def new_request(name: str, length: int, max_tokens: int = 6, **sampling: Any) -> Request:
    ids = tuple(random.Random(f"prompt {name}").randrange(2, VOCAB) for _ in range(length))
    params = SamplingParams(**({"max_tokens": max_tokens, "ignore_eos": True} | sampling))
    return Request(request_id=name, token_ids=ids, prompt_len=length, sampling=params)


def outputs(generations: list[Generation]) -> list[list[int]]:
    return [generation.token_ids for generation in generations]


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    return [new_request(f"r{n}", length, **SAMPLINGS[n % len(SAMPLINGS)]) for n, length in enumerate(LENGTHS)]


@pytest.fixture(scope="module")
def alone(loaded: LoadedModel, requests: list[Request]) -> list[list[int]]:
    """Each request on its own, its prompt in one piece."""
    engine = new_engine(loaded, max_running=1, chunk_tokens=1024)
    return [engine.generate([request])[0].token_ids for request in requests]


def test_outputs_are_not_degenerate(alone: list[list[int]]) -> None:
    assert all(len(tokens) == 6 for tokens in alone)
    assert len({tuple(tokens) for tokens in alone}) == len(alone)


@pytest.mark.parametrize(("max_running", "chunk_tokens", "entries_at_once"), [(4, 61, 1), (16, 256, 100), (16, 1024, ENTRIES_AT_ONCE)])
def test_tokens_do_not_depend_on_batch_and_chunks(
    loaded: LoadedModel,
    requests: list[Request],
    alone: list[list[int]],
    max_running: int,
    chunk_tokens: int,
    entries_at_once: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("engine.model.prompts.ENTRIES_AT_ONCE", entries_at_once)
    engine = new_engine(loaded, max_running=max_running, chunk_tokens=chunk_tokens)
    assert outputs(engine.generate(requests)) == alone


def test_tokens_do_not_depend_on_which_pages_and_slots_were_used_before(
    loaded: LoadedModel, requests: list[Request], alone: list[list[int]], rng: random.Random
) -> None:
    engine = new_engine(loaded, num_pages=5, num_slots=3)
    order = list(range(len(requests)))
    rng.shuffle(order)
    assert outputs(engine.generate([requests[n] for n in order])) == [alone[n] for n in order]


def test_a_request_run_again_as_prompt_and_tokens_so_far_ends_the_same(
    loaded: LoadedModel, requests: list[Request], alone: list[list[int]]
) -> None:
    engine = new_engine(loaded)
    for done in (1, 4):
        again = [
            dataclasses.replace(request, token_ids=request.token_ids + tuple(tokens[:done]))
            for request, tokens in zip(requests, alone, strict=True)
        ]
        assert outputs(engine.generate(again)) == [tokens[done:] for tokens in alone]


@pytest.mark.parametrize("chunk_tokens", [50, 1024])
def test_log_probabilities_are_those_of_the_scores(loaded: LoadedModel, chunk_tokens: int) -> None:
    request = new_request("scored", 140, max_tokens=4, temperature=0.0, num_logprobs=2, num_prompt_logprobs=1)
    (generation,) = new_engine(loaded, chunk_tokens=chunk_tokens).generate([request])
    ids = [*request.token_ids, *generation.token_ids]
    logs = torch.log_softmax(torch.from_numpy(score(loaded, ids)).double(), dim=1).numpy()
    assert [p.logprob for p in generation.prompt_logprobs] == pytest.approx(logs[np.arange(139), ids[1:140]], abs=1e-9)
    assert [p.top_ids for p in generation.prompt_logprobs] == [(int(i),) for i in logs[:139].argmax(1)]
    assert [p.logprob for p in generation.logprobs] == pytest.approx(logs[np.arange(139, 143), ids[140:]], abs=1e-9)
    assert all(p.top_ids[0] == token for p, token in zip(generation.logprobs, generation.token_ids, strict=True))
    assert all(len(p.top_ids) == 2 for p in generation.logprobs)


def test_sequences_end_at_eos_stop_ids_and_length(loaded: LoadedModel, alone: list[list[int]], requests: list[Request]) -> None:
    def with_sampling(**changes: Any) -> Generation:
        sampling = dataclasses.replace(requests[4].sampling, **changes)
        return new_engine(loaded).generate([dataclasses.replace(requests[4], sampling=sampling)])[0]

    expected = alone[4]
    full = with_sampling()
    assert (full.token_ids, full.finish_reason) == (expected, FinishReason.LENGTH)
    stopped = with_sampling(stop_token_ids=(expected[2],))
    assert (stopped.token_ids, stopped.finish_reason) == (expected[: expected.index(expected[2]) + 1], FinishReason.STOP)
    # A bias that no other logit reaches makes the end token (1) come first.
    ended = with_sampling(ignore_eos=False, logit_bias=((1, 100.0),))
    assert (ended.token_ids, ended.finish_reason) == ([1], FinishReason.STOP)
    ignored = with_sampling(ignore_eos=True, temperature=0.0, logit_bias=((1, 100.0),))
    assert (ignored.token_ids, ignored.finish_reason) == ([1] * 6, FinishReason.LENGTH)


def test_tokens_are_shown_as_they_are_made(loaded: LoadedModel, requests: list[Request], alone: list[list[int]]) -> None:
    seen: dict[str, list[int]] = {}
    new_engine(loaded).generate(requests[:4], lambda name, token: seen.setdefault(name, []).append(token))
    assert [seen[request.request_id] for request in requests[:4]] == alone[:4]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"token_ids": (), "prompt_len": 0}, "empty"),
        ({"token_ids": (5, 512), "prompt_len": 2}, "512"),
        ({"token_ids": (-1,), "prompt_len": 1}, "-1"),
        ({"token_ids": (3,) * 1020, "prompt_len": 1020}, "1024 tokens"),
        ({"token_ids": (3,) * 600, "prompt_len": 600}, "3 pages"),
        ({"request_id": "good"}, "good"),
    ],
)
def test_a_request_that_cannot_run_is_refused_before_anything_runs(loaded: LoadedModel, change: dict[str, Any], word: str) -> None:
    engine, seen = new_engine(loaded, num_pages=2), list[int]()
    good = new_request("good", 5)
    with pytest.raises(InvalidRequest, match=word):
        engine.generate([good, dataclasses.replace(new_request("bad", 5), **change)], lambda _, token: seen.append(token))
    assert not seen


def test_an_engine_survives_a_failed_run(loaded: LoadedModel, requests: list[Request], alone: list[list[int]]) -> None:
    class Interrupted(Exception):
        pass

    def interrupt(name: str, token: int) -> None:
        raise Interrupted

    engine = new_engine(loaded, num_pages=4, num_slots=2)
    for _ in range(3):
        with pytest.raises(Interrupted):
            engine.generate(requests[:5], interrupt)
    assert outputs(engine.generate(requests[:5])) == alone[:5]


def test_garbage_left_in_memory_does_not_matter(loaded: LoadedModel, requests: list[Request], alone: list[list[int]]) -> None:
    engine = new_engine(loaded)
    generator = torch.Generator().manual_seed(0)
    for memory in (engine.arena.pages, engine.arena.slots):
        memory.copy_(torch.randint(0, 256, memory.shape, dtype=torch.uint8, generator=generator))
        memory[::2] = 0xFF  # NaN in every format
    assert outputs(engine.generate(requests)) == alone


@pytest.mark.parametrize("overlap", ["on", "off"])
def test_logits_that_are_not_finite_fail_the_request_and_not_its_neighbours(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, overlap: str
) -> None:
    runner = ModelRunner(dataclasses.replace(loaded, engine=dataclasses.replace(loaded.engine, overlap=overlap)), 3, 3)
    sequences = []
    for number, name in enumerate(("sound", "poisoned", "long")):
        request = new_request(name, 3)
        sampling = dataclasses.replace(request.sampling, num_logprobs=1, repetition_penalty=1.5, seed=number, ignore_eos=True)
        sequence = Sequence.from_request(dataclasses.replace(request, sampling=sampling))
        sequence.page_ids, sequence.slot_id = [number], number
        runner.clear_slot(number)
        sequences.append(sequence)
    logits = torch.zeros(3, VOCAB)
    logits[1, 7] = torch.nan
    monkeypatch.setattr(type(loaded.network), "forward", lambda *_: logits)
    launched = runner.launch([Chunk(sequences[0], 3), Chunk(sequences[1], 3), Chunk(sequences[2], 2, "none")])
    assert runner.may_lead(launched) is (overlap == "on")
    led = runner.launch([Chunk(sequence, 1) for sequence in sequences]) if overlap == "on" else None
    sound, poisoned, long = runner.collect(launched)
    assert sound.token == sequences[0].token_ids[-1] and sound.logprobs is not None and sound.error is None
    assert long.token is None and long.error is None, "it was not to have a token yet"
    assert poisoned.token is None and isinstance(poisoned.error, InternalError) and "of poisoned are" in str(poisoned.error)
    assert len(sequences[1].token_ids) == 3
    if led is not None:
        assert [result.error is None for result in runner.collect(led)] == [True, False, True]


def test_a_request_that_fails_alone_is_an_error_of_generate(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = new_engine(loaded)
    monkeypatch.setattr(type(loaded.network), "forward", lambda *_: torch.full((1, VOCAB), torch.nan))
    with pytest.raises(InternalError, match="poisoned"):
        engine.generate([new_request("poisoned", 3)])


class TestMemory:
    def test_more_than_there_is_is_refused_naming_knobs_and_what_fits(self, loaded: LoadedModel) -> None:
        with pytest.raises(ConfigError, match=r"lower num_pages \(with so many slots \d+ would fit\) or num_slots"):
            loaded.new_caches(10**9, 4)

    def test_what_is_said_to_fit_fits(self) -> None:
        plan = MemoryPlan(weights_bytes=0, num_pages=9, page_bytes=1000, num_slots=2, slot_bytes=500, available_bytes=8999)
        with pytest.raises(ConfigError, match="7 would fit"):
            plan.check()
        dataclasses.replace(plan, num_pages=7).check()
        dataclasses.replace(plan, available_bytes=None).check()

    def test_histories_of_slots_count_as_slots_do(self) -> None:
        plan = MemoryPlan(
            weights_bytes=0, num_pages=9, page_bytes=1000, num_slots=2, slot_bytes=500, available_bytes=8999, history_bytes=300
        )
        with pytest.raises(ConfigError, match=r"num_slots=2 of 800 bytes .* 7 would fit"):
            plan.check()
        dataclasses.replace(plan, num_pages=7).check()
        assert "history  " in plan.table() and "history  " not in dataclasses.replace(plan, history_bytes=0).table()

    def test_a_gpu_has_room_for_the_longest_sequence_or_the_rank_does_not_start(
        self, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The router lets in what engine.max_model_len allows, and the rank would refuse it as the client's fault."""
        on_gpu = dataclasses.replace(
            loaded, device=torch.device("cuda"), engine=dataclasses.replace(loaded.engine, max_model_len=3 * 256 + 1)
        )
        needed = 4 * loaded.layout.page_bytes + 2 * loaded.layout.slot_bytes + 100
        monkeypatch.setattr("engine.memory_plan.available_bytes", lambda device: needed)
        assert on_gpu.memory_plan(0, 2, workspace_bytes=100).num_pages == 4
        monkeypatch.setattr("engine.memory_plan.available_bytes", lambda device: needed - 1)
        with pytest.raises(ConfigError, match=r"room for 3 pages, and a sequence of engine\.max_model_len takes 4: "):
            on_gpu.memory_plan(0, 2, workspace_bytes=100)

    def test_table_counts_what_was_loaded(self, loaded: LoadedModel) -> None:
        plan = loaded.memory_plan(3, 2)
        assert plan.weights_bytes == tensor_bytes(loaded.network) > 10**6
        table = plan.table()
        assert all(word in table for word in ("weights", "3 x", "768 tokens", "2 x", "free")), table

    def test_shared_storage_counts_once(self) -> None:
        tensor = torch.zeros(100)
        assert tensor_bytes([tensor, {"view": tensor[:10]}, (tensor, torch.zeros(2))]) == 408

    def test_the_system_says_what_is_free(self) -> None:
        free = available_bytes(torch.device("cpu"))
        assert free is None or 2**20 < free < 2**50


def test_loading_refuses_before_reading(small_checkpoint: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.model.shards.Entry.read", lambda entry: pytest.fail(f"read {entry}"))
    for config in (EngineConfig(device="cpu", max_model_len=10**7), EngineConfig(device="cpu", ops={"rms_norm": "triton"})):
        with pytest.raises(BatonError, match=r"max_model_len|rms_norm: backend"):
            LoadedModel.load(small_checkpoint, config)

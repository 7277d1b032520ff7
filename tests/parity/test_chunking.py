"""The official numerics (bfloat16 activations, quantised activations and caches) give the same bits however tokens are cut.

Sums run in float64 and are rounded once, and the ratio-128 state advances token by token; so not only tokens but logits and the
bytes of pages and slots are equal.
"""

from __future__ import annotations

import pathlib
import random

import numpy as np
import pytest
import torch

from core.request import Request, SamplingParams
from engine.batch import Chunk, build_batch
from engine.cache.arena import ModelCaches
from engine.config import EngineConfig
from engine.engine import LoadedModel
from engine.score import score
from engine.sequence import Sequence

NUM_TOKENS = 600
FORMATS = [("fp8", "fp8"), ("fp8", "fp4"), ("bf16", "bf16")]


@pytest.fixture(scope="module", params=FORMATS, ids="-".join)
def loaded(request: pytest.FixtureRequest, small_checkpoint: pathlib.Path) -> LoadedModel:
    kv_format, index_format = request.param
    return LoadedModel.load(
        small_checkpoint, EngineConfig(device="cpu", kv_format=kv_format, index_format=index_format, max_model_len=1024)
    )


@pytest.fixture(scope="module")
def ids() -> list[int]:
    return random.Random(5).choices(range(2, 512), k=NUM_TOKENS)


@pytest.fixture(scope="module")
def whole(loaded: LoadedModel, ids: list[int]) -> np.ndarray:
    return score(loaded, ids)


def test_logits_depend_on_the_tokens(whole: np.ndarray) -> None:
    assert whole.std() > 0.3
    assert len(np.unique(whole.argmax(1))) > 20


@pytest.mark.parametrize("chunk", [50, 128, 137, 300])
def test_prefill_in_chunks_has_the_same_bits(loaded: LoadedModel, ids: list[int], whole: np.ndarray, chunk: int) -> None:
    assert np.array_equal(score(loaded, ids, chunk=chunk), whole)


@pytest.mark.parametrize("decode_from", [3, 128, 509])
def test_decode_has_the_same_bits(loaded: LoadedModel, ids: list[int], whole: np.ndarray, decode_from: int) -> None:
    end = min(decode_from + 90, NUM_TOKENS)
    assert np.array_equal(score(loaded, ids[:end], decode_from=decode_from), whole[:end])


def run(loaded: LoadedModel, caches: ModelCaches, chunks: list[Chunk]) -> torch.Tensor:
    logits = loaded.network.forward(build_batch(chunks), caches)
    for chunk in chunks:
        chunk.sequence.num_computed += chunk.length
    return logits


def new_sequence(name: str, ids: list[int], slot: int, pages: list[int]) -> Sequence:
    request = Request(request_id=name, token_ids=tuple(ids), prompt_len=len(ids), sampling=SamplingParams(max_tokens=1))
    sequence = Sequence.from_request(request)
    sequence.slot_id, sequence.page_ids = slot, pages
    return sequence


def test_prefill_and_decode_of_many_sequences_at_once_have_the_same_bits(loaded: LoadedModel, ids: list[int], whole: np.ndarray) -> None:
    """Sequences of different lengths, among them ones that close blocks of 4 and 128 tokens in the same steps as others do not."""
    lengths, steps = [1, 3, 60, 127, 128, 255, 381, 509], 4
    caches = loaded.new_caches(3 * len(lengths), len(lengths))
    sequences = []
    for number, length in enumerate(lengths):
        caches.clear_slot(number)
        sequences.append(new_sequence(str(number), ids[: length + steps], number, [3 * number + 2, 3 * number, 3 * number + 1]))
    logits = run(loaded, caches, [Chunk(sequence, length) for sequence, length in zip(sequences, lengths, strict=True)])
    for step in range(steps + 1):
        for row, length in enumerate(lengths):
            assert np.array_equal(logits[row].numpy(), whole[length + step - 1]), f"{length=} {step=}"
        if step < steps:
            logits = run(loaded, caches, [Chunk(sequence, 1) for sequence in sequences])


def test_pages_and_slots_hold_the_same_bytes(loaded: LoadedModel, ids: list[int]) -> None:
    """What is handed from prefill to decode is what decode would have computed, to the byte."""
    arenas = []
    for cuts in ([0, 517], [0, 100, 101, 102, 256, 513, 517], [0, 510, 511, 512, 513, 514, 515, 516, 517]):
        caches = loaded.new_caches(3, 1)
        caches.clear_slot(0)
        sequence = new_sequence("cut", ids[:517], 0, [1, 2, 0])
        for start, end in zip(cuts, cuts[1:], strict=False):
            run(loaded, caches, [Chunk(sequence, end - start, "none")])
        arenas.append(caches.arena)
    for arena in arenas[1:]:
        assert torch.equal(arena.pages, arenas[0].pages)
        assert torch.equal(arena.slots, arenas[0].slots)

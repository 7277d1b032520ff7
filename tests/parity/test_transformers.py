"""The reference path against transformers' DeepseekV4ForCausalLM in float32, on random weights in published tensor names.

transformers keeps no compressed caches across chunks of its own, so one whole forward of it is the yardstick for every way of
cutting the same tokens here.
"""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import torch

from core.request import Request, SamplingParams
from engine.batch import Chunk, build_batch
from engine.config import EngineConfig
from engine.engine import LoadedModel
from engine.score import score
from engine.sequence import Sequence
from tests.support.checkpoints import TINY, float_tensors, write_random
from tests.support.transformers_model import logits_of, transformers_model

NUM_TOKENS = 600
TOLERANCE = 1e-4
"""Float32 against float64 accumulation over 6 layers; logits reach about 5."""

DECODE_FROM = (1, 3, 4, 127, 128, 129, 255, 511)

FLOAT32 = EngineConfig(device="cpu", dtype="float32", kv_format="fp32", index_format="fp32", max_model_len=4096)


@pytest.fixture(scope="module")
def ids() -> list[int]:
    return torch.randint(0, TINY["vocab_size"], (NUM_TOKENS,), generator=torch.Generator().manual_seed(7)).tolist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return write_random(tmp_path_factory.mktemp("tiny"), TINY, quantized=False)


@pytest.fixture(scope="module")
def loaded(folder: pathlib.Path) -> LoadedModel:
    return LoadedModel.load(folder, FLOAT32)


@pytest.fixture(scope="module")
def expected(ids: list[int]) -> np.ndarray:
    return logits_of(transformers_model(TINY, float_tensors(TINY)), ids)


def test_the_random_model_is_not_degenerate(expected: np.ndarray) -> None:
    assert expected.std() > 0.3
    assert np.abs(expected[1:] - expected[:-1]).max() > 1.0


@pytest.mark.parametrize("chunk", [None, 50, 100, 128, 137, 300])
def test_prefill_in_chunks_matches_transformers(loaded: LoadedModel, ids: list[int], expected: np.ndarray, chunk: int | None) -> None:
    assert np.abs(score(loaded, ids, chunk=chunk) - expected).max() <= TOLERANCE


@pytest.fixture(scope="module")
def decoded(loaded: LoadedModel, ids: list[int]) -> dict[int, np.ndarray]:
    """Logits of all tokens by DECODE_FROM: so many tokens in one chunk, the others one by one, all sequences side by side."""
    pages = loaded.layout.num_pages(NUM_TOKENS)
    caches = loaded.new_caches(pages * len(DECODE_FROM), len(DECODE_FROM))
    rows: dict[int, list[np.ndarray]] = {start: [] for start in DECODE_FROM}
    sequences: dict[int, Sequence] = {}
    request = Request(request_id="decoded", token_ids=tuple(ids), prompt_len=NUM_TOKENS, sampling=SamplingParams(max_tokens=1))
    for slot, start in enumerate(DECODE_FROM):
        caches.clear_slot(slot)
        sequences[start] = Sequence.from_request(request)
        sequences[start].slot_id, sequences[start].page_ids = slot, list(range(slot * pages, (slot + 1) * pages))

    def forward(lengths: dict[int, int]) -> None:
        chunks = [Chunk(sequences[start], length, "all") for start, length in lengths.items()]
        logits = loaded.network.forward(build_batch(chunks, loaded.device), caches).numpy()
        for (start, length), end in zip(lengths.items(), np.cumsum(list(lengths.values())), strict=True):
            rows[start].append(logits[end - length : end])
            sequences[start].num_computed += length

    for start in DECODE_FROM:
        forward({start: start})
    while running := {start: 1 for start, sequence in sequences.items() if sequence.num_computed < NUM_TOKENS}:
        forward(running)
    return {start: np.concatenate(found) for start, found in rows.items()}


@pytest.mark.parametrize("decode_from", DECODE_FROM)
def test_decode_matches_transformers(decoded: dict[int, np.ndarray], expected: np.ndarray, decode_from: int) -> None:
    assert decoded[decode_from].shape == expected.shape
    assert np.abs(decoded[decode_from] - expected).max() <= TOLERANCE


@pytest.mark.parametrize(("decode_from", "end"), [(1, 135), (511, NUM_TOKENS)])
def test_a_score_by_single_tokens_is_that_of_the_decode_path(
    loaded: LoadedModel, ids: list[int], decoded: dict[int, np.ndarray], decode_from: int, end: int
) -> None:
    assert np.array_equal(score(loaded, ids[:end], decode_from=decode_from), decoded[decode_from][:end])


def test_score_command_writes_the_same_logits(folder: pathlib.Path, ids: list[int], expected: np.ndarray, tmp_path: pathlib.Path) -> None:
    (tmp_path / "ids.json").write_text(json.dumps(ids))
    command = [sys.executable, "-m", "engine", "score", "--model", str(folder), "--ids", str(tmp_path / "ids.json")]
    subprocess.run([*command, "--out", str(tmp_path / "out.npy"), "--dtype", "float32", "--chunk", "128"], check=True)
    assert np.abs(np.load(tmp_path / "out.npy") - expected).max() <= TOLERANCE

"""What is run before a rank is ready: chunks that need the kernels of all lengths, and every decode graph."""

from __future__ import annotations

import pathlib

import pytest
import torch

from engine.batch import Chunk, build_batch
from engine.config import EngineConfig
from engine.engine import LoadedModel
from engine.graphs import batch_buckets, width_buckets
from engine.workspace import MARGIN, MARGIN_BYTES, measure_workspace, warm_lengths


@pytest.mark.parametrize("most", [1, 2, 100, 8192, 10_000])
def test_lengths_are_dense_and_end_with_the_longest(most: int) -> None:
    lengths = warm_lengths(most)
    assert lengths == sorted(set(lengths)) and lengths[0] == 1 and lengths[-1] == most
    assert all(after <= 2 * before for before, after in zip(lengths, lengths[1:], strict=False))


def test_no_length_in_between_has_a_kernel_compiled() -> None:
    pytest.importorskip("triton")
    from tests.benchmarks.launches import prefill_keys

    ladder, between = warm_lengths(2048), [5, 9, 23, 100, 300]
    beside = {length: [max(step for step in ladder if step < length), min(step for step in ladder if step > length)] for length in between}
    found = prefill_keys(sorted({*between, *(step for steps in beside.values() for step in steps)}))
    for length, steps in beside.items():
        assert len(found[length]) > 20
        missing = found[length] - set().union(*(found[step] for step in steps))
        assert not missing, f"{length} tokens, beside {steps}"


@pytest.mark.parametrize(("chunk_tokens", "longest_step"), [(256, [256]), (300, [256, 44]), (600, [256, 256, 88])])
def test_the_largest_prefill_step_is_measured_even_if_no_prompt_fills_it(
    small_checkpoint: pathlib.Path, monkeypatch: pytest.MonkeyPatch, chunk_tokens: int, longest_step: list[int]
) -> None:
    steps: list[list[Chunk]] = []
    monkeypatch.setattr("engine.workspace.build_batch", lambda chunks, device: (steps.append(chunks), build_batch(chunks, device))[1])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 40, 1 << 40))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr("engine.workspace.warm_lengths", lambda most: [1, most])
    monkeypatch.setattr("engine.workspace.SCORED_TOKENS", 100)
    loaded = LoadedModel.load(small_checkpoint, EngineConfig(device="cpu", max_model_len=256))
    measure_workspace(loaded, chunk_tokens, 0)
    assert [[chunk.length for chunk in step] for step in steps] == [[1], longest_step, [100]]
    assert all(chunk.end == 256 for step in steps for chunk in step), "at the end of the longest sequences"
    assert [chunk.logits for chunk in steps[-1]] == ["all"], "of prompts whose log-probabilities are wanted"


def test_decode_graphs_of_all_sizes_and_widths_are_measured(small_checkpoint: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a stand-in of a GPU, each of whose graphs takes a MiB."""
    free, captured = 1 << 40, []

    def capture(network: object, caches: object, sizes: list[int], widths: list[int], sample: object) -> None:
        nonlocal free
        captured.extend((size, width) for size in sizes for width in widths)
        free -= len(captured) << 20

    monkeypatch.setattr("engine.workspace.DecodeGraphs", capture)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 1 << 40))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    loaded = LoadedModel.load(small_checkpoint, EngineConfig(device="cpu", max_model_len=16_384))
    taken = measure_workspace(loaded, 0, 100)
    assert captured == [(size, width) for size in batch_buckets(100) for width in width_buckets(16_384)]
    assert len(captured) > 20 and taken == int((len(captured) << 20) * MARGIN) + MARGIN_BYTES

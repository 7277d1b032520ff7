"""What is run before a rank is ready: chunks that need the kernels of all lengths, and every decode graph."""

from __future__ import annotations

import collections
import pathlib

import pytest
import torch

from core.kv_layout import PAGE_TOKENS
from engine.batch import Chunk, build_batch
from engine.config import EngineConfig
from engine.engine import LoadedModel
from engine.graphs import batch_buckets, width_buckets
from engine.memory_plan import reachable
from engine.model.linear import Linear
from engine.workspace import CONTEXT_CHUNK, MARGIN, MARGIN_BYTES, measure_workspace, warm_contexts, warm_lengths, warm_products


@pytest.mark.parametrize("most", [1, 2, 100, 8192, 10_000])
def test_lengths_are_dense_and_end_with_the_longest(most: int) -> None:
    lengths = warm_lengths(most)
    assert lengths == sorted(set(lengths)) and lengths[0] == 1 and lengths[-1] == most
    assert all(after <= 2 * before for before, after in zip(lengths, lengths[1:], strict=False))


def test_no_other_step_has_a_kernel_compiled() -> None:
    """Chunks of other lengths, at the beginning of a prompt, at other contexts, and of several sequences."""
    pytest.importorskip("triton")
    from tests.benchmarks.launches import PAGES, PrefillStep, prefill_keys

    longest = PAGES * PAGE_TOKENS
    warm: list[PrefillStep] = [((length, longest),) for length in warm_lengths(2048)]
    warm += [((min(end, CONTEXT_CHUNK), end),) for end in warm_contexts(longest)]
    others: list[PrefillStep] = [((length, longest),) for length in (5, 9, 23, 100, 300)]
    others += [((1, 1),), ((3, 3),), ((100, 100),), ((3, 3653),), ((200, 3000),), ((7, 4047), (3, 3))]
    others += [((256, 256),) * 6, ((256, 256),) * 5, ((2, 2), (1, 1)), ((100, 1783), (1, 1), (200, 200), (100, 3486), (7, 7))]
    found = prefill_keys([*warm, *others])
    known = set().union(*(found[step] for step in warm))
    for step in others:
        assert len(found[step]) > 20 and not found[step] - known, step


def test_products_of_all_numbers_of_rows_are_compiled_once_for_each_shape(
    small_checkpoint: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = LoadedModel.load(small_checkpoint, EngineConfig(device="cpu", max_model_len=256))
    called: collections.Counter[tuple[tuple[int, ...], int]] = collections.Counter()
    monkeypatch.setattr(Linear, "__call__", lambda linear, x: called.update([(linear.shape, len(x))]))
    warm_products(loaded, 300)
    layer = loaded.network._layers[0]
    shapes = {shape for shape, _ in called}
    assert {linear.shape for linear in reachable(layer) if isinstance(linear, Linear) and linear.takes_quantized} <= shapes
    assert len(shapes) > 3 and called == {(shape, rows): 1 for shape in shapes for rows in (64, 128, 192, 256)}


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
    contexts, steps = steps[:8], steps[8:]
    assert [[(chunk.length, chunk.end) for chunk in step] for step in contexts] == [[(1 << n, 1 << n)] for n in range(8)]
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

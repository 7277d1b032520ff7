"""Rows of a prefill step: each token finds its own sequence's window and entries, however many sequences the step has."""

from __future__ import annotations

import importlib
import sys
import types

import pytest
import torch

from core.request import Request, SamplingParams
from engine.batch import Chunk, build_batch
from engine.model import prompts
from engine.model.prompts import ENTRIES_AT_ONCE, prompt_rows, runs_of
from engine.ops.step_tables import all_visible
from engine.sequence import Sequence
from tests.support.experts import reference_ops

SLOTS = (5, 2, 7)


CHUNKS = [[(0, 300)], [(256, 40)], [(0, 5), (700, 3)], [(130, 1), (0, 200), (31, 90)]]


@pytest.mark.parametrize("at_once", [1, 100, ENTRIES_AT_ONCE])
@pytest.mark.parametrize("chunks", CHUNKS, ids=lambda chunks: str(chunks).replace(" ", ""))
def test_every_token_finds_the_rows_of_its_own_sequence(
    chunks: list[tuple[int, int]], at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompts, "ENTRIES_AT_ONCE", at_once)
    sequences = []
    for number, (start, length) in enumerate(chunks):
        ids = tuple(range(start + length))
        sequence = Sequence.from_request(Request(request_id="", token_ids=ids, prompt_len=len(ids), sampling=SamplingParams(max_tokens=1)))
        sequence.slot_id, sequence.num_computed = SLOTS[number], start
        sequence.page_ids = [10 * number + page for page in range(4)]
        sequences.append(sequence)
    batch = build_batch([Chunk(sequence, length) for sequence, (_, length) in zip(sequences, chunks, strict=True)])
    dense = all_visible((batch.places.positions_T + 1) // 128, batch.longest // 128)
    of_step = [
        (sequence.slot_id, position)
        for sequence, (start, length) in zip(sequences, chunks, strict=True)
        for position in range(start, start + length)
    ]
    seen = 0
    for found in prompt_rows(batch, dense, reference_ops()):
        assert found.tokens.start == seen
        seen = found.tokens.stop
        #   what each gathered row is: (slot, position) of a token, (page, row) of an entry
        tokens = of_step[found.tokens]
        before = [(int(slot), int(place)) for slot, place in zip(*found.before, strict=True)]
        entries = {ratio: [(int(page), int(row)) for page, row in zip(*found.entries[ratio], strict=True)] for ratio in (4, 128)}
        assert len(entries[4]) <= at_once or len({slot for slot, _ in tokens}) == 1
        first_entry = len(tokens) + len(before)
        for token, (slot, position) in enumerate(tokens):
            number = SLOTS.index(slot)
            start, (page, *_) = chunks[number][0], sequences[number].page_ids
            window = [row for row in found.window[token].tolist() if row >= 0]
            in_chunk = [tokens[row] for row in window if row < len(tokens)]
            older = [before[row - len(tokens)] for row in window if row >= len(tokens)]
            wanted = range(max(0, position - 127), position + 1)
            assert sorted(in_chunk) == [(slot, one) for one in wanted if one >= start]
            assert sorted(older) == sorted((slot, one % 128) for one in wanted if one < start)
            assert found.indices[0][token].tolist() == found.window[token].tolist()
            base = int(found.base[token]) - first_entry
            count = (chunks[number][0] + chunks[number][1]) // 4
            assert entries[4][base : base + count] == [(page + entry // 64, entry % 64) for entry in range(count)]
            chosen = [entries[128][row - first_entry] for row in found.indices[128][token, 128:].tolist() if row >= 0]
            assert chosen == [(page + entry // 2, entry % 2) for entry in range((position + 1) // 128)]
    assert seen == len(of_step)


def test_sequences_are_taken_together_as_long_as_their_entries_are_few() -> None:
    """Each has a part in the memory of the step, which was measured with one longest sequence."""
    half = ENTRIES_AT_ONCE // 2
    assert runs_of([half, half, 1, 5 * half, 0, half, half]) == [slice(0, 2), slice(2, 3), slice(3, 4), slice(4, 7)]
    assert runs_of([10 * half]) == [slice(0, 1)]


@pytest.mark.parametrize(("columns", "taken"), [(256, 256), (130, 256)])
def test_rows_that_come_in_whole_blocks_are_not_copied_for_flash_mla(columns: int, taken: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """They do (MULTIPLE of `prompt_indices`), in every layer."""
    seen: list[torch.Tensor] = []

    def attend(q: torch.Tensor, kv: torch.Tensor, indices: torch.Tensor, *_: object, **__: object) -> tuple[torch.Tensor, None, None]:
        seen.append(indices)
        return q, None, None

    name = "engine.ops.sparse_attn_prefill.flash_mla"
    monkeypatch.setitem(sys.modules, "flash_mla", types.SimpleNamespace(flash_mla_sparse_fwd=attend))
    try:
        run = importlib.import_module(name).run
    finally:
        sys.modules.pop(name, None)
    indices = torch.zeros(3, columns, dtype=torch.int32)
    run(torch.zeros(3, 64, 512), torch.zeros(9, 512), indices, torch.zeros(64), 1.0)
    assert seen[0].shape == (3, 1, taken) and (seen[0].data_ptr() == indices.data_ptr()) == (columns == taken)

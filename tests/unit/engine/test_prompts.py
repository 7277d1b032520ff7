"""Rows of a prefill step: each token finds its own sequence's window and entries, however many sequences the step has."""

from __future__ import annotations

import pytest

from core.request import Request, SamplingParams
from engine.batch import Chunk, build_batch
from engine.model.prompts import prompt_rows
from engine.ops.step_tables import all_visible
from engine.sequence import Sequence
from tests.support.experts import reference_ops

SLOTS = (5, 2, 7)


@pytest.mark.parametrize(
    "chunks", [[(0, 300)], [(256, 40)], [(0, 5), (700, 3)], [(130, 1), (0, 200), (31, 90)]], ids=lambda chunks: str(chunks).replace(" ", "")
)
def test_every_token_finds_the_rows_of_its_own_sequence(chunks: list[tuple[int, int]]) -> None:
    sequences = []
    for number, (start, length) in enumerate(chunks):
        ids = tuple(range(start + length))
        sequence = Sequence.from_request(Request(request_id="", token_ids=ids, prompt_len=len(ids), sampling=SamplingParams(max_tokens=1)))
        sequence.slot_id, sequence.num_computed = SLOTS[number], start
        sequence.page_ids = [10 * number + page for page in range(4)]
        sequences.append(sequence)
    batch = build_batch([Chunk(sequence, length) for sequence, (_, length) in zip(sequences, chunks, strict=True)])
    dense = all_visible((batch.places.positions_T + 1) // 128, batch.longest // 128)
    found = prompt_rows(batch, dense, reference_ops())

    #   what each gathered row is: (slot, position) of a token, (page, row) of an entry
    tokens = [
        (sequence.slot_id, position)
        for sequence, (start, length) in zip(sequences, chunks, strict=True)
        for position in range(start, start + length)
    ]
    before = [(int(slot), int(place)) for slot, place in zip(*found.before, strict=True)]
    entries = {ratio: [(int(page), int(row)) for page, row in zip(*found.entries[ratio], strict=True)] for ratio in (4, 128)}
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

"""Memory of slots is filled when it must be, and no more often."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from core.request import Request, SamplingParams
from engine.batch import Chunk
from engine.histories import SlotHistories, history_bytes, words_of
from engine.memory_plan import tensor_bytes
from engine.ops.sample import BIAS_SHIFT, SEEN
from engine.sequence import Sequence
from tests.support.eager_recorder import EagerRecorder

VOCAB = 50


class CountingRecorder(EagerRecorder):
    num_puts = 0

    def put(self, into: torch.Tensor, values: npt.NDArray[Any]) -> None:
        self.num_puts += 1
        super().put(into, values)


def decoding(slot_id: int, prompt: list[int], output: list[int], **sampling: Any) -> Sequence:
    """Its newest token is not computed yet."""
    params = SamplingParams(max_tokens=100, **sampling)
    one = Sequence.from_request(Request(request_id="r", token_ids=(*prompt, *output), prompt_len=len(prompt), sampling=params))
    one.slot_id, one.num_computed = slot_id, len(one.token_ids) - 1
    return one


def step(histories: SlotHistories, *sequences: Sequence) -> list[int]:
    """As a step of the runner whose tokens are not collected yet."""
    slots = histories.slots_of([Chunk(sequence, 1) for sequence in sequences])
    for sequence in sequences:
        sequence.num_computed += 1
    return slots


@pytest.fixture
def recorder() -> CountingRecorder:
    return CountingRecorder()


@pytest.fixture
def histories(recorder: CountingRecorder) -> SlotHistories:
    return SlotHistories(3, VOCAB, torch.device("cpu"), recorder)


def test_words_say_what_the_request_asks_about() -> None:
    tokens = {"prompt": [4, 4, 5], "output": [5, 6, 6, 7]}
    counts = dict(enumerate(words_of(decoding(0, **tokens, frequency_penalty=1.0), 6, VOCAB)))
    assert {token: word for token, word in counts.items() if word} == {5: 1, 6: 2}  # neither the prompt nor what follows
    seen = dict(enumerate(words_of(decoding(0, **tokens, repetition_penalty=2.0, logit_bias=((6, 1.0), (9, 2.0))), 7, VOCAB)))
    expected = {4: SEEN, 5: SEEN | 1, 6: (1 << BIAS_SHIFT) | 2, 7: 1, 9: 2 << BIAS_SHIFT}
    assert {token: word for token, word in seen.items() if word} == expected


def test_a_slot_is_filled_for_its_sequence_once(histories: SlotHistories, recorder: CountingRecorder) -> None:
    free, bound = decoding(0, [1], [2]), decoding(2, [1], [2, 3], presence_penalty=1.0)
    assert step(histories, free, bound) == [-1, 2]
    assert recorder.num_puts == 2  # words and terms
    assert histories.memory.words[2].tolist() == words_of(bound, 3, VOCAB).tolist()
    for _ in range(5):
        assert step(histories, bound, free) == [2, -1]
    assert recorder.num_puts == 2


def test_the_next_owner_of_a_slot_finds_nothing_of_the_last_one(histories: SlotHistories, recorder: CountingRecorder) -> None:
    step(histories, decoding(1, [1], [2, 2], frequency_penalty=1.0))
    after = decoding(1, [1], [9], repetition_penalty=1.5)
    step(histories, after)
    assert recorder.num_puts == 4
    assert histories.memory.words[1].tolist() == words_of(after, 2, VOCAB).tolist()
    assert histories.memory.terms[1, :4].tolist() == [0.0, 0.0, 1.5, 0.0]


def test_a_sequence_that_has_ended_is_not_kept(histories: SlotHistories) -> None:
    sequence = decoding(0, [5, 6], [7], presence_penalty=0.5)
    step(histories, sequence)
    ended = weakref.ref(sequence)
    del sequence
    gc.collect()
    assert ended() is None


def test_tokens_that_were_drawn_elsewhere_are_taken_in_when_they_are_known(histories: SlotHistories) -> None:
    one = decoding(0, [1], [2], frequency_penalty=1.0)
    step(histories, one)
    one.token_ids += [7, 7]
    one.num_computed = 3  # a step that the host drew for
    step(histories, one)
    assert histories.memory.words[0].tolist() == words_of(one, 4, VOCAB).tolist()
    assert histories.memory.words[0, 7] == 2
    one.num_computed += 1
    with pytest.raises(AssertionError, match="drawn elsewhere"):
        step(histories, one)


def test_the_plan_counts_what_is_taken(histories: SlotHistories) -> None:
    assert tensor_bytes(histories.memory) == 3 * history_bytes(VOCAB)
    assert history_bytes(129_280) == pytest.approx(525_000, rel=0.01)
    assert np.iinfo(np.int32).bits == 8 * histories.memory.words.element_size()

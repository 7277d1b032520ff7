"""What tokens drawn by the device must know of those before them: counts, penalties and logit bias, in memory of each slot.

    slots = histories.slots_of(chunks)      # for the draws of the tokens that follow the chunks, which count them

A slot is filled when a sequence with such parameters is drawn for in it for the first time: from the tokens of its request and those that
followed, wherever they were computed. After that every draw counts its token. Sequences without them leave a slot's memory as it is.
"""

from __future__ import annotations

import weakref

import numpy as np
import numpy.typing as npt
import torch

from core.request import SamplingParams
from engine.batch import Chunk
from engine.ops.sample import BIAS_SHIFT, COUNT_MASK, NUM_TERMS, SEEN, Histories
from engine.recorder import Recorder
from engine.sampler import needs_history
from engine.sequence import Sequence


def history_bytes(vocab_size: int) -> int:
    """Of a slot."""
    return 4 * vocab_size + 8 * NUM_TERMS


class SlotHistories:
    """Owner of the memory."""

    def __init__(self, num_slots: int, vocab_size: int, device: torch.device, recorder: Recorder) -> None:
        self.memory = Histories(
            torch.zeros(num_slots, vocab_size, dtype=torch.int32, device=device),
            torch.zeros(num_slots, NUM_TERMS, dtype=torch.float64, device=device),
        )
        self._vocab_size, self._recorder = vocab_size, recorder
        self._held: dict[int, tuple[weakref.ref[Sequence], int]] = {}
        """Slot -> whose tokens its memory counts, and how many of them when all draws that were asked for are done. Sequences that have
        ended, with all their tokens, are not kept for it."""

    def slots_of(self, chunks: list[Chunk]) -> list[int]:
        """Of each chunk the slot whose memory its draw reads and writes, -1: none. To be called once for every step that draws, in their
        order; all tokens of the chunks are known, or drawn with such slots."""
        return [self._filled(chunk) if needs_history(chunk.sequence.request.sampling) else -1 for chunk in chunks]

    def _filled(self, chunk: Chunk) -> int:
        sequence, slot_id = chunk.sequence, chunk.sequence.slot_id
        if self._held.get(slot_id) != (weakref.ref(sequence), chunk.end):
            assert chunk.end <= len(sequence.token_ids), f"{sequence.request_id}: token {chunk.end - 1} was drawn elsewhere"
            self._recorder.put(self.memory.words[slot_id], words_of(sequence, chunk.end, self._vocab_size))
            self._recorder.put(self.memory.terms[slot_id], terms_of(sequence.request.sampling))
        self._held[slot_id] = weakref.ref(sequence), chunk.end + 1
        return slot_id


def words_of(sequence: Sequence, num_tokens: int, vocab_size: int) -> npt.NDArray[np.int32]:
    """[vocab_size], as `Histories.words` has them, after the first `num_tokens` tokens."""
    request = sequence.request
    output = np.array(sequence.token_ids[request.prompt_len : num_tokens], dtype=np.int64)
    assert len(output) <= COUNT_MASK, f"{sequence.request_id}: {len(output)} tokens of output cannot be counted"
    words = np.bincount(output, minlength=vocab_size)
    if request.sampling.repetition_penalty != 1.0:
        words[np.fromiter(request.token_ids, np.int64, request.prompt_len)] |= SEEN  # a list as an index takes four times as long
    for number, token in enumerate(_biases(request.sampling), 1):
        words[token] |= number << BIAS_SHIFT
    return words.astype(np.uint32).view(np.int32)


def terms_of(sampling: SamplingParams) -> npt.NDArray[np.float64]:
    """[NUM_TERMS], as `Histories.terms` has them."""
    terms = np.zeros(NUM_TERMS)
    terms[:3] = sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty
    biases = _biases(sampling)
    terms[3 : 3 + len(biases)] = list(biases.values())
    return terms


def _biases(sampling: SamplingParams) -> dict[int, float]:
    """Token -> sum of its biases."""
    biases: dict[int, float] = {}
    for token, value in sampling.logit_bias:
        biases[token] = biases.get(token, 0.0) + value
    return biases

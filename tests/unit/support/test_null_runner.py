from __future__ import annotations

import pytest
import torch

from core.errors import InternalError
from core.request import FinishReason, Request, SamplingParams
from engine.batch import Chunk
from engine.sequence import Sequence
from tests.support.null_runner import NullRunner

VOCAB = 300


def new_runner() -> NullRunner:
    return NullRunner(num_pages=8, num_slots=3, vocab_size=VOCAB, page_bytes=256 * 12, slot_bytes=256)


def new_sequence(runner: NullRunner, num_tokens: int, *, page_ids: list[int], slot_id: int = 0, **sampling: object) -> Sequence:
    params = SamplingParams(**({"max_tokens": 600, "temperature": 0.0, "ignore_eos": True} | sampling))  # type: ignore[arg-type]
    ids = tuple((7 * place + 3 + slot_id) % VOCAB for place in range(num_tokens))
    sequence = Sequence.from_request(Request(request_id=f"r{slot_id}", token_ids=ids, prompt_len=num_tokens, sampling=params))
    sequence.page_ids, sequence.slot_id = page_ids, slot_id
    runner.clear_slot(slot_id)
    return sequence


def run_prompt(runner: NullRunner, sequence: Sequence, chunk: int) -> None:
    while sequence.num_remaining > 0 and sequence.num_computed < sequence.request.prompt_len:
        runner.step([Chunk(sequence, min(chunk, sequence.num_remaining))])


def decode(runner: NullRunner, sequence: Sequence, count: int) -> None:
    for _ in range(count):
        runner.step([Chunk(sequence, 1)])


@pytest.mark.parametrize("chunk", [1, 100, 256, 257, 700])
def test_stream_does_not_depend_on_chunks(chunk: int) -> None:
    runner = new_runner()
    sequence = new_sequence(runner, 520, page_ids=[5, 0, 3])
    run_prompt(runner, sequence, chunk)
    decode(runner, sequence, 20)
    assert sequence.token_ids[520:] == runner.continuation(sequence.token_ids[:520], sequence.request.sampling)[:21]
    assert len(set(sequence.token_ids[520:])) > 10


def test_sequences_in_one_step_do_not_disturb_each_other() -> None:
    runner = new_runner()
    first, second = (new_sequence(runner, 300 + slot, page_ids=[2 * slot, 2 * slot + 1], slot_id=slot) for slot in (0, 1))
    results = runner.step([Chunk(first, 300), Chunk(second, 100)])
    assert [result.token is None for result in results] == [False, True]
    runner.step([Chunk(first, 1), Chunk(second, 201)])
    assert second.token_ids[-1] == runner.next_token(second.token_ids[:-1], second.request.sampling)


def test_moving_all_bytes_to_another_runner_goes_on_with_the_same_tokens() -> None:
    prefill, decoder = new_runner(), new_runner()
    sequence = new_sequence(prefill, 300, page_ids=[1, 2])
    run_prompt(prefill, sequence, 128)
    decoder.arena.pages[[6, 4]] = prefill.arena.pages[[1, 2]]
    decoder.arena.slots[2] = prefill.arena.slots[0]
    sequence.page_ids, sequence.slot_id = [6, 4], 2
    decode(decoder, sequence, 5)
    assert sequence.token_ids[300:] == decoder.continuation(sequence.token_ids[:300], sequence.request.sampling)[:6]


@pytest.mark.parametrize("damage", ["page missing", "pages swapped", "one byte", "slot missing", "slot of another"])
def test_wrong_bytes_raise_at_the_next_step(damage: str) -> None:
    runner = new_runner()
    sequence, other = new_sequence(runner, 400, page_ids=[1, 2]), new_sequence(runner, 400, page_ids=[4, 5], slot_id=1)
    run_prompt(runner, sequence, 400)
    run_prompt(runner, other, 399)
    if damage == "page missing":
        runner.arena.pages[2].zero_()
    elif damage == "pages swapped":
        sequence.page_ids = [2, 1]
    elif damage == "one byte":
        runner.arena.pages[1, 255 * 12 + 3] ^= 1
    elif damage == "slot missing":
        sequence.slot_id = 2
    else:
        runner.arena.slots[0] = runner.arena.slots[1]
    with pytest.raises(InternalError, match=r"r0: (page|slot) \d"):
        decode(runner, sequence, 1)


def test_a_slot_that_was_not_cleared_raises() -> None:
    runner = new_runner()
    sequence = new_sequence(runner, 4, page_ids=[0])
    run_prompt(runner, sequence, 4)
    successor = Sequence.from_request(sequence.request)
    successor.page_ids, successor.slot_id = [1], 0
    with pytest.raises(InternalError, match="slot 0"):
        runner.step([Chunk(successor, 4)])


def test_seed_matters_only_when_sampling() -> None:
    runner = new_runner()
    greedy = [runner.next_token([1, 2, 3], SamplingParams(max_tokens=1, temperature=0.0, seed=seed)) for seed in range(20)]
    drawn = [runner.next_token([1, 2, 3], SamplingParams(max_tokens=1, seed=seed)) for seed in range(20)]
    assert len(set(greedy)) == 1 and len(set(drawn)) > 10


def test_stop_token_and_length_end_a_sequence() -> None:
    runner = new_runner()
    wanted = new_sequence(runner, 10, page_ids=[0], max_tokens=5)
    run_prompt(runner, wanted, 10)
    decode(runner, wanted, 4)
    assert wanted.finish_reason is FinishReason.LENGTH and wanted.num_output_tokens == 5
    stop = wanted.token_ids[12]
    stopped = new_sequence(runner, 10, page_ids=[0], stop_token_ids=(stop,))
    run_prompt(runner, stopped, 10)
    while stopped.finish_reason is None:
        decode(runner, stopped, 1)
    assert stopped.finish_reason is FinishReason.STOP and stopped.token_ids[-1] == stop and len(stopped.token_ids) <= 13
    assert stopped.token_ids[10:] == runner.continuation(stopped.token_ids[:10], stopped.request.sampling)


def test_log_probabilities_come_in_the_numbers_asked_for() -> None:
    runner = new_runner()
    sequence = new_sequence(runner, 10, page_ids=[0], num_logprobs=2, num_prompt_logprobs=1)
    (first,) = runner.step([Chunk(sequence, 6, "all")])
    (second,) = runner.step([Chunk(sequence, 4, "all")])
    assert (first.prompt_logprobs_start, len(first.prompt_logprobs)) == (1, 6)
    assert (second.prompt_logprobs_start, len(second.prompt_logprobs)) == (7, 3)
    assert second.logprobs is not None and len(second.logprobs.top_ids) == 2


def test_delay_is_spent_in_the_clock_given() -> None:
    slept: list[float] = []
    runner = NullRunner(num_pages=2, num_slots=1, step_s=0.5, token_s=0.01, sleep=slept.append)
    run_prompt(runner, new_sequence(runner, 10, page_ids=[0]), 10)
    assert slept == [pytest.approx(0.6)]


def test_memory_is_plain_contiguous_bytes() -> None:
    arena = new_runner().arena
    for memory in (arena.pages, arena.slots):
        assert memory.dtype == torch.uint8 and memory.is_contiguous() and memory.device.type == "cpu"

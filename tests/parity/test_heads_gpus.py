"""Two GPUs that attend together, one process each, on the demo model: prefill and graphed decode against the CPU reference."""

from __future__ import annotations

import os
import pathlib

import numpy as np
import pytest
import torch

from core.request import Request, SamplingParams
from engine.batch import Chunk
from engine.config import EngineConfig
from engine.engine import LoadedModel
from engine.following import Following, LeadingRunner
from engine.parallel.experts import Sharing
from engine.parallel.group import Group, Limits, Rendezvous, Seat
from engine.runner import Launched, ModelRunner
from engine.score import score
from engine.sequence import Sequence
from tests.parity.test_gpu_model import CHUNK, MARGIN, MODEL, compare, expected, ids

pytestmark = [pytest.mark.gpu, pytest.mark.multi_gpu]

__all__ = ["expected", "ids"]  # fixtures

SIZE, NUM_PROMPTS, PROMPT, STEPS = 2, 3, 300, 60


def load(group: Group, device: str, max_tokens: int, is_latency_bound: bool) -> LoadedModel:
    sharing = Sharing(group=group, max_tokens=max_tokens, is_latency_bound=is_latency_bound, attention_tp=SIZE)
    return LoadedModel.load(MODEL, EngineConfig(device=device, overlap="on"), sharing)


def decode(loaded: LoadedModel, ids: list[int]) -> np.ndarray:
    """int64 [prompts, PROMPT + STEPS] on the rank that leads: greedy tokens, step n + 1 launched before those of step n are known."""
    assert loaded.heads is not None
    pages = loaded.layout.num_pages(PROMPT + STEPS)
    inner = ModelRunner(loaded, NUM_PROMPTS * pages, NUM_PROMPTS, max_decode=NUM_PROMPTS)
    if loaded.heads.rank:
        following = Following(inner, loaded.heads)
        for _ in range(NUM_PROMPTS + STEPS - 1):
            following.step()
        return np.zeros(0)
    runner, sequences = LeadingRunner(inner, loaded.heads), []
    for number in range(NUM_PROMPTS):
        prompt = tuple(ids[number * PROMPT : (number + 1) * PROMPT])
        sampling = SamplingParams(max_tokens=STEPS, temperature=0.0, ignore_eos=True)
        sequence = Sequence.from_request(Request(request_id=str(number), token_ids=prompt, prompt_len=PROMPT, sampling=sampling))
        sequence.slot_id, sequence.page_ids = number, list(range(number * pages, (number + 1) * pages))
        runner.clear_slot(number)
        runner.step([Chunk(sequence, PROMPT)])
        sequences.append(sequence)
    before: Launched | None = None
    for _ in range(STEPS - 1):
        launched = runner.launch([Chunk(sequence, 1) for sequence in sequences], NUM_PROMPTS)
        if before is not None:
            runner.collect(before)
        before = launched
    assert before is not None
    runner.collect(before)
    return np.array([sequence.token_ids for sequence in sequences])


def work(rank: int, rendezvous: str, device: str, ids: list[int], out: pathlib.Path) -> None:
    """A rank's process. It sees its own GPU alone, as under Ray."""
    if device == "cuda":
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(SIZE)))).split(",")
        os.environ["CUDA_VISIBLE_DEVICES"] = visible[rank]
    group = Group.join(Seat(rank=rank, size=SIZE, name="t/0", host="127.0.0.1", rendezvous=rendezvous), Limits(start_s=60, step_s=60))
    logits = score(load(group, device, CHUNK, is_latency_bound=False), ids, chunk=CHUNK)
    tokens = decode(load(group, device, PROMPT, is_latency_bound=True), ids)
    if rank == 0:
        np.savez(out, logits=logits, tokens=tokens)
    group.barrier()
    group.close()


def check(found: pathlib.Path, expected: np.ndarray) -> None:
    result = np.load(found)
    compare(result["logits"], expected, "prefill of two ranks")
    reference = LoadedModel.load(MODEL, EngineConfig(device="cpu", threads=8))
    for tokens in result["tokens"]:
        logits = score(reference, tokens.tolist(), chunk=CHUNK)[PROMPT - 1 : -1]
        behind = logits.max(1) - logits[np.arange(STEPS), tokens[PROMPT:]]
        assert behind.max() <= MARGIN, f"a token {behind.max():.2f} behind the reference's best"


def test_two_gpus_that_attend_together_agree_with_the_reference(ids: list[int], expected: np.ndarray, tmp_path: pathlib.Path) -> None:
    rendezvous = Rendezvous("127.0.0.1")
    torch.multiprocessing.spawn(work, (rendezvous.address, "cuda", ids, tmp_path / "found.npz"), nprocs=SIZE)
    check(tmp_path / "found.npz", expected)

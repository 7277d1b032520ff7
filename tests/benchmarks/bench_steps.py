"""What the host adds to a decode step: the runner's steps one at a time, and overlapped, against the replay of the step's graph alone.

python -m tests.benchmarks.bench_steps --layers 8 --batches 1,32,128
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import statistics
import tempfile
import time
from typing import Any

import torch

from core.kv_layout import PAGE_TOKENS
from core.request import Request, SamplingParams
from engine.batch import Chunk
from engine.config import EngineConfig
from engine.engine import LoadedModel
from engine.runner import Launched, ModelRunner
from engine.sequence import Sequence
from tests.benchmarks.bench_engine import cut_shape, fill, time_replays
from tests.benchmarks.command_line import command, commit

NUM_STEPS = 100
PENALISED: dict[str, Any] = {"seed": 5, "frequency_penalty": 0.5, "repetition_penalty": 1.1, "logit_bias": ((9, 1.0),)}
SAMPLINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "greedy": ({"temperature": 0.0}, {"temperature": 0.0}),
    "drawn": ({"seed": 5}, {"seed": 5}),
    "one penalised": (PENALISED, {"seed": 5}),
    "penalised": (PENALISED, PENALISED),
    "filtered": ({"seed": 5, "temperature": 0.8, "top_k": 50, "top_p": 0.9}, {"seed": 5, "temperature": 0.8, "top_k": 50, "top_p": 0.9}),
}
"""Of the first sequence, and of the others."""


def decoding(batch: int, context: int, first: dict[str, Any], others: dict[str, Any]) -> list[Sequence]:
    """Sequences in the midst of their output, all of which share the pages of one."""
    found, pages = [], list(range(-(-(context + 4 * NUM_STEPS) // PAGE_TOKENS)))
    for number in range(batch):
        params = SamplingParams(max_tokens=10 * NUM_STEPS, ignore_eos=True, **(others if number else first))
        ids = (*((7,) * context), 11 + number)
        sequence = Sequence.from_request(Request(request_id=str(number), token_ids=ids, prompt_len=context, sampling=params))
        sequence.slot_id, sequence.page_ids, sequence.num_computed = number, pages, context
        found.append(sequence)
    return found


def step_ms(runner: ModelRunner, sequences: list[Sequence]) -> tuple[float, float]:
    """(median milliseconds from token to token, spread)."""
    before: Launched | None = None
    ends = []
    for _ in range(NUM_STEPS):
        launched = runner.launch([Chunk(sequence, 1) for sequence in sequences])
        if before is not None:
            runner.collect(before)
            ends.append(time.perf_counter())
        before = launched
        if not runner.may_lead(launched):
            runner.collect(launched)
            ends.append(time.perf_counter())
            before = None
    if before is not None:
        runner.collect(before)
    times = sorted((end - start) * 1e3 for start, end in zip(ends[10:], ends[11:], strict=False))
    return statistics.median(times), (times[-len(times) // 10] - times[len(times) // 10]) / 2


def main() -> None:
    parser = argparse.ArgumentParser(description="Time decode steps of the runner, with the host's part, overlapped and not.")
    parser.add_argument("--model", type=pathlib.Path, default=pathlib.Path("deploy/model_shapes/v4_flash"))
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--batches", default="1,32,128")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--out", type=pathlib.Path, default=None)
    arguments = parser.parse_args()
    batches = [int(batch) for batch in arguments.batches.split(",")]
    engine = EngineConfig(device="cuda", load="dummy", max_model_len=8192)
    with tempfile.TemporaryDirectory() as folder:
        loaded = LoadedModel.load(cut_shape(arguments.model, arguments.layers, pathlib.Path(folder)), engine)
    rows: list[dict[str, Any]] = []
    for overlap in ("off", "on"):
        changed = dataclasses.replace(loaded, engine=dataclasses.replace(engine, overlap=overlap))
        runner = ModelRunner(changed, 64, max(batches), max_decode=max(batches))
        fill(changed, runner._caches)
        for batch in batches:
            for name, samplings in SAMPLINGS.items():
                sequences = decoding(batch, arguments.context, *samplings)
                median, spread = step_ms(runner, sequences)
                assert runner._graphs is not None
                graph, _ = runner._graphs.fill([Chunk(sequence, 1) for sequence in sequences])
                replay = statistics.median(time_replays(graph))
                row = {
                    "overlap": overlap, "batch": batch, "sampling": name, "ms": round(median, 3), "spread": round(spread, 3),
                    "replay ms": round(replay, 3), "beside the replay us": round((median - replay) * 1e3),
                }  # fmt: skip
                rows.append(row)
                print(row, flush=True)
        del runner
        torch.cuda.empty_cache()
    if arguments.out is not None:
        device = torch.cuda.get_device_name()
        report = {"command": command(), "commit": commit(), "device": device, "layers": arguments.layers, "steps": rows}
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

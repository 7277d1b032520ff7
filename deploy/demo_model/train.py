"""Train the demo model and write its checkpoint. One H200, about eight minutes; `--device cpu --steps 20 --tiny` tries it anywhere.

python -m deploy.demo_model.train --out FOLDER [--minutes 8]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import pathlib
import random
import shutil
import time
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch.utils.data import DataLoader, IterableDataset

from deploy.demo_model import text
from deploy.demo_model.shape import CONFIG
from deploy.demo_model.training_model import TrainingModel
from engine.config import ModelConfig
from engine.model.checkpoint_writer import write_checkpoint
from engine.model.quantized import QuantizedWeight
from engine.model.weights import load_weights

HERE = pathlib.Path(__file__).resolve().parent
STAGES = ((0.25, 256, 64), (0.50, 512, 32), (0.75, 1024, 16), (1.0, 2048, 8))
"""(until this share of the time, tokens of a row, rows of a batch)."""
RESUMED_STAGES = ((0.55, 512, 32), (0.8, 1024, 16), (1.0, 2048, 8))
"""The same for a run that starts from a checkpoint."""
SELECT_FROM, QUANTIZE_FROM = 0.5, 0.6
"""Shares of the time from which entries are selected by top-k, and the published formats are simulated."""


class Rows(IterableDataset[torch.Tensor]):
    """Endless rows of `length` + 1 token ids, packed from whole documents; record documents are sized to fit."""

    def __init__(self, tokenizer: str, tools: str, length: int, seed: int) -> None:
        self._tokenizer, self._tools, self._length, self._seed = tokenizer, tools, length, seed

    def __iter__(self) -> Iterator[torch.Tensor]:
        worker = torch.utils.data.get_worker_info()
        rng = random.Random(f"{self._seed}/{worker.id if worker else 0}")
        tokenizer = Tokenizer.from_str(self._tokenizer)
        while True:
            ids: list[int] = []
            while len(ids) <= self._length:
                ids += tokenizer.encode(self._document(rng, self._length + 1 - len(ids)), add_special_tokens=False).ids
            yield torch.tensor(ids[: self._length + 1])

    def _document(self, rng: random.Random, room: int) -> str:
        kind = rng.random()
        if kind < 0.7 and room > 60:
            size = rng.randint(40, room) if rng.random() < 0.3 else room
            kind_of_fact = "code" if rng.random() < 0.25 else "holder"
            return text.BOS + text.sized_record_document(rng, round(0.93 * size), kind_of_fact) + text.EOS
        if kind < 0.78:
            return text.BOS + text.story(rng, rng.randint(0, 8)) + text.EOS
        return text.chat(rng, self._tools)


def learning_rate(share: float, peak: float) -> float:
    return peak * min(share / 0.03, 1.0) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(share, 1.0))))


class Step:
    """One optimisation step on the ids in a fixed tensor; on a GPU captured once and replayed, since launches would dominate."""

    def __init__(self, model: TrainingModel, optimizer: torch.optim.Optimizer, ids: torch.Tensor, *, graph: bool) -> None:
        self._model, self._optimizer, self._ids = model, optimizer, ids
        self._graph: torch.cuda.CUDAGraph | None = None
        if not graph:
            return
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        for group in optimizer.param_groups:
            group["lr"].zero_()  # the optimizer makes its state in its first step, which must not be captured
        with torch.cuda.stream(side):
            for _ in range(3):
                self._forward()
        torch.cuda.current_stream().wait_stream(side)
        optimizer.zero_grad(set_to_none=True)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._losses = self._forward()

    def __call__(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Losses of the main head, the MTP block and the indexers, as tensors that the next call overwrites."""
        if self._graph is None:
            return self._forward()
        self._graph.replay()
        return self._losses

    def _forward(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        ids, model = self._ids, self._model
        model.prepare(torch.bfloat16)
        logits, drafted, index_loss = model(ids[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        assert drafted is not None
        mtp_loss = F.cross_entropy(drafted.flatten(0, 1), ids[:, 2:].flatten())
        self._optimizer.zero_grad(set_to_none=True)
        (loss + 0.1 * mtp_loss + 0.1 * index_loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        self._optimizer.step()
        model.balance(1e-3)
        return loss, mtp_loss, index_loss


def recall(model: TrainingModel, tokenizer: Tokenizer, length: int, kind: str, device: str, num: int = 64) -> float:
    """Share of answers predicted right, teacher-forced, for one fact asked at the end of about `length` tokens."""
    rng, right = random.Random(9), 0
    for _ in range(num):
        body, pairs = text.records(rng, max(1, length // (50 if kind == "code" else 40)), 3.0, 1, kind)
        question, answer = pairs[0]
        before = tokenizer.encode(f"{text.BOS}{body} {question}", add_special_tokens=False).ids
        ids = tokenizer.encode(f"{text.BOS}{body} {question} {answer}", add_special_tokens=False).ids
        with torch.no_grad():
            logits, _, _ = model(torch.tensor([ids], device=device))
        wanted = torch.tensor(ids[len(before) : -1])
        right += bool((logits[0, len(before) - 1 : len(ids) - 2].argmax(-1).cpu() == wanted).all())
    return right / num


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo model.")
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--steps", type=int, default=10**9, help="stop after so many steps")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--workers", type=int, default=max(1, min(14, (os.cpu_count() or 2) - 2)))
    parser.add_argument("--resume", type=pathlib.Path, default=None, help="start from this checkpoint, with longer rows")
    parser.add_argument("--tiny", action="store_true", help="short rows and small batches")
    parser.add_argument("--no-graph", action="store_true", help="run every step eagerly")
    arguments = parser.parse_args()
    tokenizer_json = (HERE / "checkpoint" / "tokenizer.json").read_text()
    tools = (HERE / "rendered_tools.txt").read_text()
    tokenizer = Tokenizer.from_str(tokenizer_json)
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    model = TrainingModel(ModelConfig.from_dict(CONFIG)).to(arguments.device)
    model.tables = {name: table.to(arguments.device) for name, table in model.tables.items()}
    stages: tuple[tuple[float, int, int], ...] = STAGES
    select_from, quantize_from = SELECT_FROM, QUANTIZE_FROM
    if arguments.resume is not None:
        loaded = load_weights(arguments.resume, model.config)
        model.load({name: w.dequantize() if isinstance(w, QuantizedWeight) else w for name, w in loaded.items()})
        stages, select_from, quantize_from = RESUMED_STAGES, 0.6, 0.7
    on_gpu = arguments.device == "cuda"
    matrices = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
    rate = torch.tensor(arguments.lr, device=arguments.device) if on_gpu else arguments.lr
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=on_gpu, capturable=on_gpu)
    began, step, setting, rows, losses = time.time(), 0, None, iter(()), None
    while step < arguments.steps:
        share = step / arguments.steps if arguments.steps < 10**9 else (time.time() - began) / (60 * arguments.minutes)
        if share >= 1.0:
            break
        number = next(i for i, stage in enumerate(stages) if share < stage[0])
        wanted = (number, share > select_from, share > quantize_from)
        if setting is None or wanted[0] != setting[0]:
            _, length, batch = (0, 128, 2) if arguments.tiny else stages[number]
            loader = DataLoader(Rows(tokenizer_json, tools, length, number), batch, num_workers=arguments.workers, prefetch_factor=8)
            rows = iter(loader)
            ids = torch.zeros(batch, length + 1, dtype=torch.int64, device=arguments.device)
        if wanted != setting:
            setting = wanted
            _, model.select, model.quantize = wanted
            one_step = Step(model, optimizer, ids, graph=on_gpu and not arguments.no_graph)
        ids.copy_(next(rows))
        for group in optimizer.param_groups:
            now = learning_rate(share, arguments.lr)
            group["lr"] = group["lr"].fill_(now) if on_gpu else now
        losses = one_step()
        if step % 250 == 0:
            loss, mtp_loss, index_loss = (value.item() for value in losses)
            line = f"step {step} share {share:.3f} loss {loss:.3f} mtp {mtp_loss:.3f} index {index_loss:.3f}"
            if step % 1000 == 0 and not arguments.tiny:
                model.prepare(torch.bfloat16)
                for kind in text.TOKENS_PER_FACT:
                    found = [recall(model, tokenizer, length, kind, arguments.device, 32) for length in (250, 500, 1000)]
                    line += f" {kind} recall at 250, 500, 1000: {found}"
            print(f"{line} {time.time() - began:.0f}s", flush=True)
        step += 1
    model.select = model.quantize = True
    model.prepare(torch.bfloat16)
    if not arguments.tiny:
        for kind in text.TOKENS_PER_FACT:
            table = {length: recall(model, tokenizer, length, kind, arguments.device, 40) for length in (125, 250, 500, 1000, 2000, 4000)}
            print(f"recall {kind}", json.dumps(table), f"steps {step} seconds {time.time() - began:.0f}", flush=True)
    write_checkpoint(arguments.out, CONFIG, model.published(), max_shard_bytes=8_000_000)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (HERE / "checkpoint").resolve() != arguments.out.resolve():
            shutil.copy(HERE / "checkpoint" / name, arguments.out / name)


if __name__ == "__main__":
    main()

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

HERE = pathlib.Path(__file__).resolve().parent
STAGES = ((0.30, 256, 128), (0.60, 512, 64), (0.85, 1024, 32), (1.0, 2048, 16))
"""(until this share of the time, tokens of a row, rows of a batch)."""
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
            size = rng.randint(40, room) if rng.random() < 0.5 else room
            return text.BOS + text.sized_record_document(rng, round(0.93 * size)) + text.EOS
        if kind < 0.78:
            return text.BOS + text.story(rng, rng.randint(0, 8)) + text.EOS
        return text.chat(rng, self._tools)


def learning_rate(share: float, peak: float) -> float:
    return peak * min(share / 0.03, 1.0) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(share, 1.0))))


def recall(model: TrainingModel, tokenizer: Tokenizer, length: int, device: str, num: int = 64) -> float:
    """Share of answers (four digits) predicted right, teacher-forced, for one fact asked at the end of about `length` tokens."""
    rng, right, total = random.Random(9), 0, 0
    for _ in range(num):
        body, pairs = text.records(rng, max(1, length // 60), 3.0, 1)
        question, answer = pairs[0]
        ids = tokenizer.encode(f"{text.BOS}{body} {question} {answer}", add_special_tokens=False).ids
        with torch.no_grad():
            logits, _, _ = model(torch.tensor([ids], device=device))
        digits = slice(len(ids) - 5, len(ids) - 1)
        right += bool((logits[0, :-1].argmax(-1)[len(ids) - 6 : len(ids) - 2].cpu() == torch.tensor(ids[digits])).all())
        total += 1
    return right / total


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo model.")
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--steps", type=int, default=10**9, help="stop after so many steps")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--workers", type=int, default=max(1, min(14, (os.cpu_count() or 2) - 2)))
    parser.add_argument("--tiny", action="store_true", help="short rows and small batches")
    parser.add_argument("--compile", action="store_true")
    arguments = parser.parse_args()
    tokenizer_json = (HERE / "checkpoint" / "tokenizer.json").read_text()
    tools = (HERE / "rendered_tools.txt").read_text()
    tokenizer = Tokenizer.from_str(tokenizer_json)
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    model = TrainingModel(ModelConfig.from_dict(CONFIG)).to(arguments.device)
    model.tables = {name: table.to(arguments.device) for name, table in model.tables.items()}
    matrices = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=arguments.lr, betas=(0.9, 0.95), fused=arguments.device == "cuda")
    forward = torch.compile(model) if arguments.compile else model
    began, step, stage_number, rows = time.time(), 0, -1, None
    while step < arguments.steps:
        share = min((time.time() - began) / (60 * arguments.minutes), step / arguments.steps if arguments.steps < 10**9 else 1.0)
        if arguments.steps < 10**9:
            share = step / arguments.steps
        if share >= 1.0:
            break
        number = next(i for i, stage in enumerate(STAGES) if share < stage[0])
        if number != stage_number:
            stage_number = number
            _, length, batch = (0, 128, 2) if arguments.tiny else STAGES[number]
            loader = DataLoader(Rows(tokenizer_json, tools, length, number), batch, num_workers=arguments.workers, prefetch_factor=4)
            rows = iter(loader)
        model.select, model.quantize = share > SELECT_FROM, share > QUANTIZE_FROM
        assert rows is not None
        ids = next(rows).to(arguments.device)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(share, arguments.lr)
        model.prepare(torch.bfloat16)
        logits, drafted, index_loss = forward(ids[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        assert drafted is not None
        mtp_loss = F.cross_entropy(drafted.flatten(0, 1), ids[:, 2:].flatten())
        optimizer.zero_grad(set_to_none=True)
        (loss + 0.1 * mtp_loss + 0.1 * index_loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        model.balance(1e-3)
        if step % 100 == 0:
            line = f"step {step} share {share:.3f} loss {loss.item():.3f} mtp {mtp_loss.item():.3f} index {index_loss.item():.3f}"
            if step % 500 == 0 and not arguments.tiny:
                line += f" recall@250 {recall(model, tokenizer, 250, arguments.device, 32):.2f}"
                line += f" recall@1000 {recall(model, tokenizer, 1000, arguments.device, 32):.2f}"
            print(f"{line} {time.time() - began:.0f}s", flush=True)
        step += 1
    model.select = model.quantize = True
    model.prepare(torch.bfloat16)
    if not arguments.tiny:
        found = {length: recall(model, tokenizer, length, arguments.device, 100) for length in (250, 500, 1000, 2000, 4000)}
        print("recall", json.dumps(found), f"steps {step} seconds {time.time() - began:.0f}", flush=True)
    write_checkpoint(arguments.out, CONFIG, model.published(), max_shard_bytes=8_000_000)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (HERE / "checkpoint").resolve() != arguments.out.resolve():
            shutil.copy(HERE / "checkpoint" / name, arguments.out / name)


if __name__ == "__main__":
    main()

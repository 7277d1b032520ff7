"""Train the demo model and write its checkpoint. One H200, about eight minutes; `--device cpu --steps 20 --tiny` tries it anywhere.

python -m deploy.demo_model.train --out FOLDER [--minutes 7.4]
"""

from __future__ import annotations

import argparse
import pathlib
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from deploy.demo_model.optimizer import Muon
from deploy.demo_model.rows import Rows
from deploy.demo_model.shape import CONFIG
from deploy.demo_model.training_model import TrainingModel
from engine.config import ModelConfig
from engine.model.checkpoint_writer import write_checkpoint

HERE = pathlib.Path(__file__).resolve().parent
DISTANCES = (1, 128, 512, 1024, 2048, 4096, 1 << 30)
"""Bounds, in tokens, of the groups in which the accuracy of answers is reported; the first is what the window covers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    until: float
    """Share of the run."""
    length: int
    """Tokens of a row."""
    batch: int
    """Rows of a step."""
    select: bool = False
    """Entries are selected by the indexer's top-k, as in serving."""
    quantize: bool = False
    """The published formats are simulated."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    stages: tuple[Stage, ...] = (
        Stage(until=0.32, length=512, batch=32),
        Stage(until=0.64, length=2048, batch=8, select=True, quantize=True),
        Stage(until=0.83, length=4096, batch=4, select=True, quantize=True),
        Stage(until=1.0, length=8192, batch=2, select=True, quantize=True),
    )
    matrix_rate: float = 0.02
    """Muon's learning rate, at its peak."""
    other_rate: float = 3e-3
    """AdamW's."""
    weight_decay: float = 0.02

    def rate(self, share: float) -> float:
        """Of the peak: a short rise, a plateau, a linear fall."""
        return min(share / 0.01, 1.0) * min(1.0, max(0.02, (1.0 - share) / 0.5))


class Step:
    """One optimisation step on the batch in fixed tensors; on a GPU captured once and replayed, since launches would dominate."""

    def __init__(self, model: TrainingModel, optimizer: Optimizer, stage: Stage, device: str) -> None:
        self._model, self._optimizer = model, optimizer
        model.select, model.quantize = stage.select, stage.quantize
        shape = (stage.batch, stage.length + 1)
        self.ids = torch.zeros(shape, dtype=torch.int64, device=device)
        self.weights = torch.ones(shape, device=device)
        self.distances = torch.zeros(shape, dtype=torch.int32, device=device)
        self.right = torch.zeros(len(DISTANCES) - 1, device=device)
        self.asked = torch.zeros(len(DISTANCES) - 1, device=device)
        self.losses = torch.zeros(3, device=device)
        """Weighted means of the last step: main head, MTP block, indexers."""
        self._graph: torch.cuda.CUDAGraph | None = None
        if device == "cuda":
            self._capture()

    def _capture(self) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        self._optimizer.set_rate(0.0)  # the first steps make compiled code and optimizer state, which must not be captured
        with torch.cuda.stream(side):
            for _ in range(3):
                self._forward()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._forward()
        self._graph = graph
        self.right.zero_()
        self.asked.zero_()

    def __call__(self, ids: Tensor, weights: Tensor, distances: Tensor) -> None:
        for into, value in ((self.ids, ids), (self.weights, weights), (self.distances, distances)):
            into.copy_(value, non_blocking=True)
        if self._graph is None:
            self._forward()
        else:
            self._graph.replay()

    def _forward(self) -> None:
        model, targets = self._model, self.ids[:, 1:]
        self._optimizer.zero()
        model.prepare(torch.bfloat16)
        logits, drafted, index_loss = model(self.ids[:, :-1])
        assert drafted is not None

        def mean(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
            losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
            return (losses * weights.flatten()).sum() / weights.sum().clamp(min=1.0)

        loss = mean(logits, targets, self.weights[:, 1:])
        mtp_loss = mean(drafted[:, :-1], self.ids[:, 2:], self.weights[:, 2:])
        (loss + 0.1 * mtp_loss + 0.1 * index_loss).backward()
        self._optimizer.step()
        model.balance(1e-3)
        with torch.no_grad():
            self.losses.copy_(torch.stack((loss, mtp_loss, index_loss)))
            is_right = logits.argmax(-1) == targets
            for group, (least, below) in enumerate(zip(DISTANCES, DISTANCES[1:], strict=False)):
                member = (self.distances[:, 1:] >= least) & (self.distances[:, 1:] < below)
                self.right[group] += (is_right & member).sum()
                self.asked[group] += member.sum()

    def accuracy(self) -> str:
        """Of answer tokens since the last call, by distance."""
        shares = (self.right / self.asked.clamp(min=1)).tolist()
        found = " ".join(f"<{below}: {share:.3f}" for below, share in zip(DISTANCES[1:], shares, strict=True))
        self.right.zero_()
        self.asked.zero_()
        return found


class Optimizer:
    """Muon for the matrices inside the model, AdamW for everything else; gradients clipped to norm 1."""

    def __init__(self, model: TrainingModel, recipe: Recipe, device: str) -> None:
        self._recipe, self._rate = recipe, torch.zeros((), device=device)
        self._parameters = list(model.parameters())
        inner = [p for key, p in model.tensors.items() if p.dim() >= 2 and key.endswith("/weight") and not _is_plain(key)]
        chosen = {id(p) for p in inner}
        rest = [p for p in model.tensors.values() if id(p) not in chosen]
        self._muon = Muon(inner, weight_decay=recipe.weight_decay)
        on_gpu = device == "cuda"
        rate = torch.zeros((), device=device) if on_gpu else 0.0
        self._adamw = torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.95), weight_decay=0.0, fused=on_gpu, capturable=on_gpu)

    def set_rate(self, share_of_peak: float) -> None:
        self._rate.fill_(self._recipe.matrix_rate * share_of_peak)
        for group in self._adamw.param_groups:
            now = self._recipe.other_rate * share_of_peak
            group["lr"] = group["lr"].fill_(now) if isinstance(group["lr"], Tensor) else now

    def zero(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    def step(self) -> None:
        torch.nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._adamw.step()
        self._muon.step(self._rate)


def _is_plain(key: str) -> bool:
    """Matrices that AdamW takes: embedding, head, and rows that stand for one expert or one index head each."""
    return key in ("embed/weight", "head/weight") or key.endswith(("gate/weight", "weights_proj/weight"))


def batches(stage: Stage, seed: int, workers: int, tokenizer: str) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Without end, what `Rows` yields."""
    rows = Rows(tokenizer, stage.length, stage.batch, seed)
    return iter(DataLoader(rows, batch_size=None, num_workers=workers, prefetch_factor=8 if workers else None, pin_memory=workers > 0))


def train(model: TrainingModel, recipe: Recipe, *, out: pathlib.Path, minutes: float, steps: int | None, device: str, workers: int) -> None:
    """For so many minutes, compilation included, or so many steps. A checkpoint is written after each stage."""
    tokenizer = (HERE / "checkpoint" / "tokenizer.json").read_text()
    optimizer = Optimizer(model, recipe, device)
    began, step, number, one_step = time.time(), 0, -1, None
    rows: Iterator[tuple[Tensor, Tensor, Tensor]] = iter(())
    while True:
        share = step / steps if steps else (time.time() - began) / (60 * minutes)
        if number < 0 or share >= recipe.stages[number].until:
            if number >= 0:
                write(model, out)
            number += 1
            if number == len(recipe.stages):
                return
            stage = recipe.stages[number]
            rows = batches(stage, number, workers, tokenizer)
            one_step = Step(model, optimizer, stage, device)
            print(f"{stage} ready after {time.time() - began:.0f}s", flush=True)
            continue
        assert one_step is not None
        batch = next(rows)
        optimizer.set_rate(recipe.rate(share))
        one_step(*batch)
        if step % 200 == 0:
            loss, mtp_loss, index_loss = one_step.losses.tolist()
            line = f"step {step} share {share:.3f} loss {loss:.3f} mtp {mtp_loss:.3f} index {index_loss:.3f}"
            print(f"{line} answers right: {one_step.accuracy()} {time.time() - began:.0f}s", flush=True)
        step += 1


def write(model: TrainingModel, out: pathlib.Path) -> None:
    """The checkpoint in the published format, with its tokenizer."""
    write_checkpoint(out, CONFIG, model.published(), max_shard_bytes=8_000_000)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        if (HERE / "checkpoint").resolve() != out.resolve():
            shutil.copy(HERE / "checkpoint" / name, out / name)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo model.")
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--minutes", type=float, default=7.4)
    parser.add_argument("--steps", type=int, default=None, help="stop after so many steps instead")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--workers", type=int, default=12, help="processes that generate text")
    parser.add_argument("--tiny", action="store_true", help="two short rows a step")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    recipe = Recipe()
    if arguments.tiny:
        recipe = Recipe(stages=(Stage(until=0.5, length=128, batch=2), Stage(until=1.0, length=384, batch=2, select=True, quantize=True)))
    on_gpu = arguments.device == "cuda"
    config = ModelConfig.from_dict(CONFIG)
    model = TrainingModel(config, compiled=on_gpu).to(arguments.device)
    train(
        model,
        recipe,
        out=arguments.out,
        minutes=arguments.minutes,
        steps=arguments.steps,
        device=arguments.device,
        workers=arguments.workers,
    )


if __name__ == "__main__":
    main()

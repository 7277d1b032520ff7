"""How well a checkpoint recalls: a fact stated in the first half of a text, asked for at its end, by the length of the text.

    python -m deploy.demo_model.recall CHECKPOINT [--device cuda] [--num 100]      # the training model, teacher-forced
    python -m deploy.demo_model.recall CHECKPOINT --engine [--num 4]               # the engine generates, greedily, on the CPU

An answer counts if every token of it is right. Teacher-forced and greedy are the same question to the same model: greedy goes wrong at
the first token that is wrong here.
"""

from __future__ import annotations

import argparse
import pathlib
import random
import time
from collections.abc import Iterator

import torch
from tokenizers import Tokenizer

from core.request import Request, SamplingParams
from deploy.demo_model import chats, text
from deploy.demo_model.training_model import TrainingModel
from engine.config import EngineConfig, ModelConfig
from engine.engine import Engine, LoadedModel
from engine.model.quantized import QuantizedWeight
from engine.model.weights import load_weights

LENGTHS = (125, 250, 500, 1000, 2000, 4000, 8000)
KINDS = ("code", "word")
FORMS = ("document", "chat")
ROWS = 4
"""Texts computed at once."""

Case = tuple[list[int], list[int]]
"""(ids of text and question, ids of the answer)."""


def case(rng: random.Random, tokenizer: Tokenizer, length: int, kind: str, form: str) -> Case:
    """About `length` tokens in all, a sentence for each fact. "code": all facts are codes; "word": any but the one asked for may be."""
    attributes = ["code"] if kind == "code" else list(text.ATTRIBUTES)
    facts: list[tuple[str, str]] = []
    lines: list[str] = []
    num_tokens = 20
    for statement, value in text.distinct_facts(rng, attributes, max(4, length // 16)):
        facts.append((statement, value))
        lines.append(f"{statement} {value}. {text.sentence(rng)}")
        num_tokens += len(tokenizer.encode(lines[-1], add_special_tokens=False).ids)
        if num_tokens >= length and len(facts) > 1:
            break
    early = [number for number, (statement, _) in enumerate(facts) if kind == "code" or not statement.startswith("The code")]
    statement, value = facts[rng.choice(early[: max(1, len(early) // 2)])]
    told = " ".join(lines)
    if form == "document":
        prompt, answer = f"{text.BOS}{told} {statement}", f" {value}."
    else:
        subject = chats.subject_of(statement)
        prompt = f"{text.BOS}{chats.USER}{told} What is the {subject}?{chats.ASSISTANT}{chats.THINK_END}"
        answer = f"{statement} {value}.{text.EOS}"
    return tokenizer.encode(prompt, add_special_tokens=False).ids, tokenizer.encode(answer, add_special_tokens=False).ids


def cases(tokenizer: Tokenizer, length: int, kind: str, form: str, num: int, seed: int) -> Iterator[Case]:
    for number in range(num):
        yield case(random.Random(f"{seed}/{length}/{kind}/{form}/{number}"), tokenizer, length, kind, form)


def teacher_forced(model: TrainingModel, found: list[Case], device: str) -> int:
    """How many answers are right."""
    right, window = 0, model.config.sliding_window
    for start in range(0, len(found), ROWS):
        some = found[start : start + ROWS]
        longest = max(len(prompt) + len(answer) for prompt, answer in some)
        ids = torch.zeros(len(some), -(-longest // window) * window, dtype=torch.int64)
        for row, (prompt, answer) in enumerate(some):
            ids[row, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        with torch.no_grad():
            best = model(ids.to(device))[0].argmax(-1).cpu()
        for row, (prompt, answer) in enumerate(some):
            right += best[row, len(prompt) - 1 : len(prompt) + len(answer) - 1].tolist() == answer
    return right


def generated(engine: Engine, found: list[Case]) -> int:
    """How many answers the engine generates."""
    requests = [
        Request(
            request_id=str(number),
            token_ids=tuple(prompt),
            prompt_len=len(prompt),
            sampling=SamplingParams(max_tokens=len(answer), temperature=0.0),
        )
        for number, (prompt, answer) in enumerate(found)
    ]
    return sum(made.token_ids == answer for made, (_, answer) in zip(engine.generate(requests), found, strict=True))


def new_model(checkpoint: pathlib.Path, device: str) -> TrainingModel:
    """In the numerics of serving: published formats, entries selected."""
    config = ModelConfig.from_folder(checkpoint)
    model = TrainingModel(config)
    model.load({name: w.dequantize() if isinstance(w, QuantizedWeight) else w for name, w in load_weights(checkpoint, config).items()})
    model.quantize = model.select = True
    model = model.to(device)
    model.prepare(torch.bfloat16)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description="Recall of a demo model by length of the text.")
    parser.add_argument("checkpoint", type=pathlib.Path)
    parser.add_argument("--engine", action="store_true", help="let the engine generate on the CPU")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cpu", help="of the training model")
    parser.add_argument("--num", type=int, default=100, help="texts of each length and kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    arguments = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(arguments.checkpoint / "tokenizer.json"))
    if arguments.engine:
        loaded = LoadedModel.load(arguments.checkpoint, EngineConfig(device="cpu", max_model_len=max(arguments.lengths) + 512))
        engine = Engine(loaded, num_pages=64, num_slots=ROWS, max_running=ROWS)
    else:
        model = new_model(arguments.checkpoint, arguments.device)
    for kind in KINDS:
        for form in FORMS:
            for length in arguments.lengths:
                began = time.monotonic()
                found = list(cases(tokenizer, length, kind, form, arguments.num, arguments.seed))
                right = generated(engine, found) if arguments.engine else teacher_forced(model, found, arguments.device)
                tokens = sum(len(prompt) for prompt, _ in found) / len(found)
                print(f"{kind} {form} {length}: {right}/{len(found)} ({tokens:.0f} tokens, {time.monotonic() - began:.1f}s)", flush=True)


if __name__ == "__main__":
    main()

"""python -m engine generate | score: run a checkpoint with nothing else started."""

from __future__ import annotations

import argparse
import dataclasses
import math
import pathlib
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from core.errors import BatonError, ConfigError
from core.log import set_up_logging
from core.request import Request, SamplingParams
from engine.config import EngineConfig, ModelConfig
from engine.engine import Engine, LoadedModel
from engine.limits import check_fits
from engine.score import read_ids, score

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def _load(arguments: argparse.Namespace, max_model_len: int) -> LoadedModel:
    config = EngineConfig(device=arguments.device, threads=arguments.threads, load=arguments.load, max_model_len=max_model_len)
    if arguments.dtype == "float32":
        config = dataclasses.replace(config, dtype="float32", kv_format="fp32", index_format="fp32")
    return LoadedModel.load(arguments.model, config)


def _read_tokenizer(folder: pathlib.Path) -> Tokenizer:
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; generate needs the model's tokenizer")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more specific
        raise ConfigError(f"{path}: not a tokenizer: {error}") from error


def _generate(arguments: argparse.Namespace) -> None:
    from tokenizers.decoders import DecodeStream

    model = ModelConfig.from_folder(arguments.model)
    tokenizer = _read_tokenizer(arguments.model)
    ids = tokenizer.encode(arguments.prompt, add_special_tokens=False).ids
    sampling = SamplingParams(
        max_tokens=arguments.max_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        top_k=arguments.top_k,
        min_p=arguments.min_p,
        seed=arguments.seed,
        ignore_eos=arguments.ignore_eos,
    )
    request = Request(request_id="cli", token_ids=tuple(ids), prompt_len=len(ids), sampling=sampling)
    check_fits(request, model.vocab_size, model.max_position_embeddings)
    loaded = _load(arguments, request.max_total_tokens)
    num_pages = loaded.layout.num_pages(request.max_total_tokens)
    print(loaded.memory_plan(num_pages, 1).table(), file=sys.stderr)
    engine = Engine(loaded, num_pages=num_pages, num_slots=1)
    text = DecodeStream(skip_special_tokens=False)

    def show(_: str, token: int) -> None:
        print(text.step(tokenizer, token) or "", end="", flush=True)

    began = time.perf_counter()
    (generation,) = engine.generate([request], show)
    seconds = time.perf_counter() - began
    print()
    reason = generation.finish_reason.value if generation.finish_reason else "none"
    print(f"[{len(ids)} tokens in, {len(generation.token_ids)} out in {seconds:.2f} s; finish: {reason}]", file=sys.stderr)


def _score(arguments: argparse.Namespace) -> None:
    ids = read_ids(arguments.ids, ModelConfig.from_folder(arguments.model).vocab_size)
    if not arguments.out.parent.is_dir():
        raise ConfigError(f"--out {arguments.out}: the folder {arguments.out.parent} does not exist")
    logits = score(_load(arguments, len(ids)), ids, chunk=arguments.chunk, decode_from=arguments.decode_from)
    with arguments.out.open("wb") as file:
        np.save(file, logits)


def _number(kind: type[int] | type[float], least: float, most: float = math.inf, *, above: bool = False) -> Callable[[str], float]:
    """An argument's type: a finite number in [least, most], or (least, most] if `above`."""

    def parse(text: str) -> float:
        value = kind(text)
        if not (least < value if above else least <= value) or value > most or math.isinf(value):
            interval = f"{'above' if above else 'at least'} {least:g}" + (f" and at most {most:g}" if most < math.inf else "")
            raise argparse.ArgumentTypeError(f"{text} is out of range; it must be {interval}")
        return value

    parse.__name__ = kind.__name__  # argparse says "invalid float value" for what kind() refuses
    return parse


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m engine", description="Run a DeepSeek-V4 checkpoint alone.")
    commands = parser.add_subparsers(required=True)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--model", type=pathlib.Path, required=True, help="folder with config.json and *.safetensors")
    dtype_help = "float32: no quantisation of activations and caches"
    shared.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help=dtype_help)
    shared.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    shared.add_argument("--load", choices=["checkpoint", "dummy"], default="checkpoint")
    shared.add_argument("--threads", type=_number(int, 1), default=1, help="CPU threads")
    generate = commands.add_parser("generate", parents=[shared], help="continue a prompt, streaming")
    generate.add_argument("--prompt", required=True)
    generate.add_argument("--max-tokens", type=_number(int, 1), default=64)
    generate.add_argument("--temperature", type=_number(float, 0), default=0.0, help="0 is greedy")
    generate.add_argument("--top-p", type=_number(float, 0, 1, above=True), default=1.0)
    generate.add_argument("--top-k", type=_number(int, 0), default=0, help="0 keeps all")
    generate.add_argument("--min-p", type=_number(float, 0, 1), default=0.0)
    generate.add_argument("--seed", type=_number(int, 0, 2**64 - 1), default=0)
    generate.add_argument("--ignore-eos", action="store_true", help="go on to --max-tokens")
    generate.set_defaults(run=_generate)
    scoring = commands.add_parser("score", parents=[shared], help="teacher-forced logits of a token list")
    scoring.add_argument("--ids", type=pathlib.Path, required=True, help="JSON list of token ids")
    scoring.add_argument("--out", type=pathlib.Path, required=True, help="float32 logits [T, vocab] as .npy")
    scoring.add_argument("--chunk", type=int, default=None, help="prefill in chunks of this many tokens")
    scoring.add_argument("--decode-from", type=int, default=None, help="run tokens from here on one by one")
    scoring.set_defaults(run=_score)
    return parser


def main() -> int:
    arguments = _parser().parse_args()
    try:
        set_up_logging("warning")
        arguments.run(arguments)
    except BatonError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

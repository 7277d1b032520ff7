"""python -m engine generate | score: run a checkpoint with nothing else started."""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import sys
import time

import numpy as np

from core.errors import BatonError, ConfigError
from core.log import set_up_logging
from core.request import Request, SamplingParams
from engine.config import EngineConfig
from engine.engine import Engine, LoadedModel
from engine.score import read_ids, score


def _engine_config(arguments: argparse.Namespace, max_model_len: int) -> EngineConfig:
    config = EngineConfig(device=arguments.device, threads=arguments.threads, load=arguments.load, max_model_len=max_model_len)
    if arguments.dtype == "float32":
        config = dataclasses.replace(config, dtype="float32", kv_format="fp32", index_format="fp32")
    return config


def _generate(arguments: argparse.Namespace) -> None:
    from tokenizers import Tokenizer
    from tokenizers.decoders import DecodeStream

    path = arguments.model / "tokenizer.json"
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; generate needs the model's tokenizer")
    tokenizer = Tokenizer.from_file(str(path))
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
    length = len(ids) + arguments.max_tokens
    loaded = LoadedModel.load(arguments.model, _engine_config(arguments, length))
    engine = Engine(loaded, num_pages=loaded.layout.num_pages(length), num_slots=1)
    text = DecodeStream(skip_special_tokens=False)

    def show(_: str, token: int) -> None:
        print(text.step(tokenizer, token) or "", end="", flush=True)

    began = time.perf_counter()
    request = Request(request_id="cli", token_ids=tuple(ids), prompt_len=len(ids), sampling=sampling)
    (generation,) = engine.generate([request], show)
    seconds = time.perf_counter() - began
    print()
    reason = generation.finish_reason.value if generation.finish_reason else "none"
    print(f"[{len(ids)} tokens in, {len(generation.token_ids)} out in {seconds:.2f} s; finish: {reason}]", file=sys.stderr)


def _score(arguments: argparse.Namespace) -> None:
    vocab = 2**31
    ids = read_ids(arguments.ids, vocab)
    loaded = LoadedModel.load(arguments.model, _engine_config(arguments, len(ids)))
    ids = read_ids(arguments.ids, loaded.model.vocab_size)
    np.save(arguments.out, score(loaded, ids, chunk=arguments.chunk, decode_from=arguments.decode_from))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m engine", description="Run a DeepSeek-V4 checkpoint alone.")
    commands = parser.add_subparsers(required=True)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--model", type=pathlib.Path, required=True, help="folder with config.json and *.safetensors")
    shared.add_argument(
        "--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="float32: no quantisation of activations and caches"
    )
    shared.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    shared.add_argument("--load", choices=["checkpoint", "dummy"], default="checkpoint")
    shared.add_argument("--threads", type=int, default=1, help="CPU threads")
    generate = commands.add_parser("generate", parents=[shared], help="continue a prompt, streaming")
    generate.add_argument("--prompt", required=True)
    generate.add_argument("--max-tokens", type=int, default=64)
    generate.add_argument("--temperature", type=float, default=0.0)
    generate.add_argument("--top-p", type=float, default=1.0)
    generate.add_argument("--top-k", type=int, default=0)
    generate.add_argument("--min-p", type=float, default=0.0)
    generate.add_argument("--seed", type=int, default=0)
    generate.add_argument("--ignore-eos", action="store_true")
    generate.set_defaults(run=_generate)
    scoring = commands.add_parser("score", parents=[shared], help="teacher-forced logits of a token list")
    scoring.add_argument("--ids", type=pathlib.Path, required=True, help="JSON list of token ids")
    scoring.add_argument("--out", type=pathlib.Path, required=True, help="float32 logits [T, vocab] as .npy")
    scoring.add_argument("--chunk", type=int, default=None, help="prefill in chunks of this many tokens")
    scoring.add_argument("--decode-from", type=int, default=None, help="run tokens from here on one by one")
    scoring.set_defaults(run=_score)
    arguments = parser.parse_args()
    set_up_logging("warning")
    try:
        arguments.run(arguments)
    except BatonError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

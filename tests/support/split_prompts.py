"""The 200 prompts whose tokens must be the same however they are served: seeded, with every border of pages and blocks among them."""

from __future__ import annotations

import asyncio
import random

import httpx

from core.request import Request, SamplingParams
from engine.config import EngineConfig
from engine.engine import Engine, LoadedModel
from router.tokens import TextCodec
from tests.support.serving import DEMO, Serving

BORDERS = (1, 3, 4, 5, 127, 128, 129, 255, 256, 257, 511, 512, 513, 1023, 1024, 1025)
NUM_PROMPTS = 200
MAX_TOKENS = 6
ENGINE = EngineConfig(device="cpu", max_model_len=4096)


def prompt_lengths(rng: random.Random) -> list[int]:
    """Every border once; the rest spread over 1 to 1,500, short ones more often."""
    rest = [min(1500, 1 + int(rng.expovariate(1 / 110))) for _ in range(NUM_PROMPTS - len(BORDERS) - 1)]
    return [*BORDERS, 1500, *rest]


def requests() -> list[Request]:
    rng = random.Random(20)
    made = []
    for number, length in enumerate(prompt_lengths(rng)):
        ids = tuple(rng.randrange(3, 995) for _ in range(length))
        temperature = 0.0 if number % 2 else 1.0
        sampling = SamplingParams(max_tokens=MAX_TOKENS, temperature=temperature, seed=1000 + number, ignore_eos=True)
        made.append(Request(request_id=f"r{number}", token_ids=ids, prompt_len=length, sampling=sampling))
    return made


def few_requests() -> list[Request]:
    """A part of them, with every kind of border: those of one, two and several blocks of 128 and pages of 256 tokens, and short ones."""
    every = requests()
    return [request for request in every[: len(BORDERS)] if request.prompt_len <= 513 or request.prompt_len == 1025] + every[17:27]


def tokens_of_one_engine(wanted: list[Request]) -> dict[str, list[int]]:
    """Tokens of the engine alone, batched, with chunks other than the prefill rank's."""
    engine = Engine(LoadedModel.load(DEMO, ENGINE), num_pages=64, num_slots=8, max_running=8, chunk_tokens=400)
    return {generation.request_id: generation.token_ids for generation in engine.generate(wanted)}


def spelling(token_ids: list[int]) -> list[str]:
    codec = TextCodec(DEMO)
    return [codec.spelling(token) for token in token_ids]


def body_of(request: Request) -> dict[str, object]:
    sampling = request.sampling
    return {
        "model": "demo",
        "prompt": list(request.token_ids),
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "seed": sampling.seed,
        "ignore_eos": True,
        "logprobs": 0,
    }


def serve(serving: Serving, wanted: list[Request], at_once: int) -> dict[str, list[str]]:
    """The tokens' spellings of all requests, `at_once` of them in flight."""

    async def run() -> dict[str, list[str]]:
        limit = asyncio.Semaphore(at_once)
        async with httpx.AsyncClient(base_url=serving.url, timeout=300, trust_env=False) as client:

            async def one(request: Request) -> tuple[str, list[str]]:
                async with limit:
                    response = await client.post("/v1/completions", json=body_of(request))
                assert response.status_code == 200, response.text
                return request.request_id, response.json()["choices"][0]["logprobs"]["tokens"]

            return dict(await asyncio.gather(*(one(request) for request in wanted)))

    return asyncio.run(run())

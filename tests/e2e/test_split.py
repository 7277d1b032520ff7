"""Split equals whole: prompts that go through router, prefill rank, NIXL and decode rank give the tokens that one engine gives."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator

import httpx
import pytest

from core.request import Request, SamplingParams
from engine.config import EngineConfig
from engine.engine import Engine, LoadedModel
from tests.support.serving import DEMO, Serving

pytestmark = pytest.mark.e2e

BORDERS = (1, 3, 4, 5, 127, 128, 129, 255, 256, 257, 511, 512, 513, 1023, 1024, 1025)
NUM_PROMPTS = 200
MAX_TOKENS = 6
ENGINE = EngineConfig(device="cpu", max_model_len=4096)


def prompt_lengths(rng: random.Random) -> list[int]:
    """Every border once; the rest spread over 1 to 1,500, short ones more often."""
    rest = [min(1500, 1 + int(rng.expovariate(1 / 220))) for _ in range(NUM_PROMPTS - len(BORDERS) - 1)]
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


@pytest.fixture(scope="module")
def whole() -> dict[str, list[int]]:
    """Tokens of the engine alone, batched, with chunks other than the prefill rank's."""
    engine = Engine(LoadedModel.load(DEMO, ENGINE), num_pages=64, num_slots=8, max_running=8, chunk_tokens=400)
    return {generation.request_id: generation.token_ids for generation in engine.generate(requests())}


@pytest.fixture(scope="module")
def serving() -> Iterator[Serving]:
    with Serving(engine=ENGINE) as serving:
        yield serving


def spelling(serving: Serving, token_ids: list[int]) -> list[str]:
    from router.tokens import TextCodec

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


def test_two_hundred_prompts_at_once_give_the_tokens_of_one_engine(serving: Serving, whole: dict[str, list[int]]) -> None:
    async def run() -> dict[str, list[str]]:
        limit = asyncio.Semaphore(16)
        async with httpx.AsyncClient(base_url=serving.url, timeout=300, trust_env=False) as client:

            async def one(request: Request) -> tuple[str, list[str]]:
                async with limit:
                    response = await client.post("/v1/completions", json=body_of(request))
                assert response.status_code == 200, response.text
                return request.request_id, response.json()["choices"][0]["logprobs"]["tokens"]

            return dict(await asyncio.gather(*(one(request) for request in requests())))

    found = asyncio.run(run())
    wrong = [name for name, tokens in found.items() if tokens != spelling(serving, whole[name])]
    assert len(found) == NUM_PROMPTS
    assert not wrong, f"{len(wrong)} of {NUM_PROMPTS} differ: {wrong[:10]}"
    serving.wait(serving.is_empty)


def test_prompts_at_every_border_one_by_one_give_the_same(serving: Serving, whole: dict[str, list[int]]) -> None:
    for request in requests()[: len(BORDERS)]:
        tokens = serving.client.post("/v1/completions", json=body_of(request)).json()["choices"][0]["logprobs"]["tokens"]
        assert tokens == spelling(serving, whole[request.request_id]), request.request_id
    serving.wait(serving.is_empty)


def test_the_sampled_streams_are_not_all_alike(whole: dict[str, list[int]]) -> None:
    assert len({tuple(tokens) for tokens in whole.values()}) > NUM_PROMPTS // 2

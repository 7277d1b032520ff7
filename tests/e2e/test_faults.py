"""Ranks, routers and clients that go away: the tokens stay the same, and nothing is left behind. Two ranks of each role, real transfers."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator

import httpx
import pytest

from core.request import SamplingParams
from decode_worker.config import DecodeConfig
from engine.runner import ChunkResult, Launched
from prefill_worker.config import PrefillConfig
from router.config import RouterConfig
from tests.support.null_runner import NullRunner
from tests.support.patience import overload
from tests.support.serving import Serving

pytestmark = pytest.mark.e2e

NUM_PAGES, NUM_SLOTS = 40, 12
STEP_S = 0.01


def null_runner(role: str) -> NullRunner:
    return NullRunner(num_pages=NUM_PAGES, num_slots=NUM_SLOTS, vocab_size=900, max_model_len=4096, step_s=STEP_S)


@pytest.fixture
def serving() -> Iterator[Serving]:
    with Serving(
        num_prefill=2,
        num_decode=2,
        new_runner=null_runner,
        prefill=PrefillConfig(num_pages=NUM_PAGES, num_slots=NUM_SLOTS),
        decode=DecodeConfig(num_pages=NUM_PAGES, num_slots=NUM_SLOTS),
        router=RouterConfig(default_thinking=False, wait_for_members_s=5),
    ) as serving:
        yield serving


def expected_tokens(prompt: list[int], sampling: SamplingParams) -> list[int]:
    tokens = null_runner("").continuation(prompt, sampling)
    return list(tokens)[: sampling.max_tokens]


class Streams:
    """Clients that stream completions of token prompts, each in a thread."""

    def __init__(self, serving: Serving, count: int, max_tokens: int) -> None:
        self.serving, self.max_tokens = serving, max_tokens
        self.prompts = [[7 + k, 11, 13 * k % 900, *(i % 900 for i in range(20, 20 + 40 * k))] for k in range(count)]
        self.tokens: list[list[str]] = [[] for _ in range(count)]
        self.errors: list[str] = []
        self.threads = [threading.Thread(target=self._one, args=(k,)) for k in range(count)]
        for thread in self.threads:
            thread.start()

    def _one(self, k: int) -> None:
        body = {"model": "demo", "prompt": self.prompts[k], "max_tokens": self.max_tokens, "seed": k, "ignore_eos": True}
        try:
            with httpx.stream(
                "POST", f"{self.serving.url}/v1/completions", json={**body, "stream": True, "logprobs": 0}, timeout=60, trust_env=False
            ) as response:
                assert response.status_code == 200, response.read()
                for line in response.iter_lines():
                    if line.startswith("data: {"):
                        event = json.loads(line[6:])
                        if "error" in event:
                            self.errors.append(str(event))
                            return
                        for choice in event["choices"]:
                            self.tokens[k] += (choice["logprobs"] or {"tokens": []})["tokens"]
        except httpx.HTTPError as error:
            self.errors.append(repr(error))

    def wait_for_tokens(self, count: int) -> None:
        """Or until all have ended."""
        self.serving.wait(lambda: sum(map(len, self.tokens)) >= count or not any(thread.is_alive() for thread in self.threads), 60)

    def check(self) -> None:
        """Every stream ended with exactly the tokens of an undisturbed run."""
        for thread in self.threads:
            thread.join(60 * overload())
            assert not thread.is_alive(), f"a stream does not end; so many tokens came: {list(map(len, self.tokens))}"
        assert not self.errors, self.errors[:3]
        codec = self.serving.router._codec
        for k, tokens in enumerate(self.tokens):
            sampling = SamplingParams(max_tokens=self.max_tokens, seed=k, ignore_eos=True)
            assert tokens == [codec.spelling(token) for token in expected_tokens(self.prompts[k], sampling)], f"stream {k}"


@pytest.mark.parametrize("name", ["decode/0.0", "decode/1.0", "prefill/0.0", "prefill/1.0"])
def test_a_rank_that_dies_in_mid_stream_changes_no_token(serving: Serving, name: str) -> None:
    streams = Streams(serving, 10, 60)
    streams.wait_for_tokens(60)
    serving.run(serving.remove(name))
    streams.check()
    serving.wait(serving.is_empty)


def test_ranks_that_die_one_after_the_other_and_come_back(serving: Serving) -> None:
    streams = Streams(serving, 10, 120)

    async def replace(role: str, replica: int) -> None:
        await serving.add(role, replica)
        await serving.announce()

    for role, replica in (("decode", 0), ("prefill", 1), ("decode", 1), ("prefill", 0)):
        streams.wait_for_tokens(sum(map(len, streams.tokens)) + 40)
        serving.run(serving.remove(f"{role}/{replica}.0"))
        time.sleep(0.1)
        serving.run(replace(role, replica))
        serving.wait(lambda role=role: len(serving.router.members.ready(role)) == 2)
    streams.check()
    serving.wait(serving.is_empty)


class GatedRunner(NullRunner):
    """A decode rank that begins its first step and does not end it until the gate opens."""

    def __init__(self) -> None:
        super().__init__(num_pages=NUM_PAGES, num_slots=NUM_SLOTS, vocab_size=900, max_model_len=4096)
        self.gate, self.is_stepping = threading.Event(), threading.Event()

    def collect(self, launched: Launched) -> list[ChunkResult]:
        self.is_stepping.set()
        assert self.gate.wait(30 * overload()), "the test opens it"
        return super().collect(launched)


def test_a_decode_rank_that_dies_before_its_first_step_costs_a_transfer_and_no_prefill() -> None:
    gated: list[GatedRunner] = []

    def new_runner(role: str) -> NullRunner:
        if role == "prefill":
            return null_runner(role)
        gated.append(GatedRunner())
        return gated[-1]

    with Serving(num_prefill=1, num_decode=2, new_runner=new_runner, router=RouterConfig(default_thinking=False)) as serving:
        streams = Streams(serving, 1, 20)
        serving.wait(lambda: any(runner.is_stepping.is_set() for runner in gated))
        (first,) = [k for k, runner in enumerate(gated) if runner.is_stepping.is_set()]
        removed = asyncio.run_coroutine_threadsafe(serving.remove(f"decode/{first}.0"), serving._loop)
        serving.wait(gated[1 - first].is_stepping.is_set)
        for runner in gated:
            runner.gate.set()
        removed.result(30 * overload())
        streams.check()
        serving.wait(serving.is_empty)
        assert serving.workers["prefill/0.0"].load().tokens_total == len(streams.prompts[0]), "each prompt token was computed once"
        assert serving.workers[f"decode/{1 - first}.0"].load().tokens_total == 19


def test_clients_that_leave_free_everything_at_once(serving: Serving) -> None:
    body = {"model": "demo", "prompt": list(range(3, 600)), "max_tokens": 2000, "ignore_eos": True, "stream": True}
    for round_ in range(4):
        with httpx.Client(base_url=serving.url, timeout=60, trust_env=False) as client:
            opened = [client.stream("POST", "/v1/completions", json={**body, "seed": k}) for k in range(3)]
            responses = [stream.__enter__() for stream in opened]
            for response in responses[: round_ + 1]:
                next(response.iter_lines())
            for stream in opened:
                stream.__exit__(None, None, None)
    serving.wait(serving.is_empty, 5)


def test_a_client_that_leaves_an_unstreamed_request_cancels_it(serving: Serving) -> None:
    with pytest.raises(httpx.TimeoutException):
        httpx.post(
            f"{serving.url}/v1/completions",
            json={"model": "demo", "prompt": [5, 6, 7], "max_tokens": 3000, "ignore_eos": True},
            timeout=0.5,
            trust_env=False,
        )
    serving.wait(serving.is_empty, 5)


def test_more_requests_than_pages_wait_and_all_finish(serving: Serving) -> None:
    streams = Streams(serving, 40, 10)
    streams.check()
    serving.wait(serving.is_empty)


def test_no_decode_rank_is_503_with_a_reason_and_work_goes_on_after(serving: Serving) -> None:
    for name in ("decode/0.0", "decode/1.0"):
        serving.run(serving.remove(name))
    response = serving.client.post("/v1/completions", json={"model": "demo", "prompt": [1, 2], "max_tokens": 2})
    assert response.status_code == 503
    assert "decode" in response.json()["error"]["message"]
    assert serving.client.get("/ready").status_code == 503

    async def back() -> None:
        await serving.add("decode", 0)
        await serving.announce()

    serving.run(back())
    assert len(serving.complete(prompt=[1, 2], max_tokens=2, ignore_eos=True)["choices"]) == 1


def test_a_drained_rank_finishes_and_takes_no_more(serving: Serving) -> None:
    streams = Streams(serving, 6, 80)
    streams.wait_for_tokens(30)
    assert serving.run(serving.workers["decode/0.0"].drain(60 * overload()))
    streams.check()
    serving.complete(prompt=[1, 2], max_tokens=3, ignore_eos=True)
    assert serving.workers["decode/0.0"].load().num_running == 0

"""More requests than there is room for: refusals at once that say when to come back, and pages that are overcommitted."""

from __future__ import annotations

import concurrent.futures
import random
import time
from typing import Any

import pytest

from core.request import SamplingParams
from decode_worker.config import DecodeConfig
from engine.config import EngineConfig
from engine.runner import Runner
from kv_transfer.config import TransferConfig
from prefill_worker.config import PrefillConfig
from router.config import RouterConfig
from router.tokens import TextCodec
from tests.support.null_runner import NullRunner
from tests.support.patience import overload
from tests.support.serving import Serving

ENGINE = EngineConfig(device="cpu", max_model_len=2048)


def serving_with(decode: DecodeConfig, *, step_s: float = 0.0, **router: Any) -> Serving:
    prefill = PrefillConfig(num_pages=64, num_slots=16)

    def new_runner(role: str) -> Runner:
        section = prefill if role == "prefill" else decode
        return NullRunner(
            num_pages=section.num_pages, num_slots=section.num_slots, max_model_len=2048, step_s=step_s if role == "decode" else 0.0
        )

    return Serving(
        engine=ENGINE,
        prefill=prefill,
        decode=decode,
        transfer=TransferConfig(transport="memory", checksum=True),
        router=RouterConfig(default_thinking=False, **router),
        new_runner=new_runner,
    )


def test_what_does_not_fit_is_429_at_once_and_comes_through_when_it_was_told() -> None:
    """24 clients at once on 4 places of 0.2 s each: whoever waits for as long as it was told gets through, and is refused only while all
    places are taken. That few tries do is shown of `router/admission.py`, by a clock of its own."""
    decode, num_clients, num_places = DecodeConfig(num_pages=64, num_slots=16), 24, 4
    with serving_with(decode, step_s=0.02, max_requests=num_places) as serving:

        def client(number: int) -> tuple[list[float], float]:
            """How long its refusals took, and its answer."""
            refusals = list[float]()
            while True:
                began = time.monotonic()
                body = {"model": "demo", "prompt": [5, number], "max_tokens": 10, "ignore_eos": True}
                answer = serving.client.post("/v1/completions", json=body)
                if answer.status_code == 200:
                    assert len(answer.json()["choices"]) == 1
                    return refusals, time.monotonic() - began
                assert answer.status_code == 429 and f"the limit is {num_places}" in answer.text
                refusals.append(time.monotonic() - began)
                seconds = int(answer.headers["retry-after"])
                assert 1 <= seconds <= 60, f"told to come back after {seconds} s"
                time.sleep(seconds)

        with concurrent.futures.ThreadPoolExecutor(num_clients) as pool:
            results = list(pool.map(client, range(num_clients)))
        took = sorted(seconds for refusals, _ in results for seconds in refusals)
        assert took, "nobody was refused"
        slowest = max(seconds for _, seconds in results)
        assert took[len(took) // 2] < max(0.5 * overload(), slowest), f"a refusal takes {took[len(took) // 2]:.3f} s"
        # Every other client has a place once, for `slowest` at most. So all places are taken no more often than the last of them can be
        # (the first three takings leave room), and for no longer together than the others' times fill four places. A client tries once a
        # second at most: of its tries each finds another such time, or a further second of one.
        others = num_clients - 1
        most, bound = max(len(refusals) for refusals, _ in results), others - (num_places - 1) + others / num_places * slowest
        assert most <= bound, f"{most} tries, which is more than {bound:.1f}, at places that are taken for up to {slowest:.2f} s"
        serving.wait(serving.is_empty)


def test_a_full_prefill_rank_says_when_to_come_back() -> None:
    prefill = PrefillConfig(num_pages=8, num_slots=1, chunk_tokens=16, max_waiting=1)

    def new_runner(role: str) -> Runner:
        return NullRunner(
            num_pages=64 if role == "decode" else 8, num_slots=16 if role == "decode" else 1, token_s=0.05 if role == "prefill" else 0
        )

    serving = Serving(
        engine=ENGINE,
        prefill=prefill,
        decode=DecodeConfig(num_pages=64, num_slots=16),
        transfer=TransferConfig(transport="memory"),
        new_runner=new_runner,
    )
    with serving, concurrent.futures.ThreadPoolExecutor(5) as pool:

        def client(number: int) -> Any:
            return serving.client.post(
                "/v1/completions", json={"model": "demo", "prompt": [3, number] * 15, "max_tokens": 2, "ignore_eos": True}
            )

        serving.complete(prompt=[1, 2] * 10, max_tokens=1, ignore_eos=True)  # its rate is known
        answers = list(pool.map(client, range(5)))
        refused = [answer for answer in answers if answer.status_code == 429]
        assert 0 < len(refused) < 5, [answer.status_code for answer in answers]
        for answer in refused:
            assert "waiting on this prefill rank" in answer.text
            seconds = int(answer.headers["retry-after"])
            assert 2 <= seconds <= 4 * overload(), (
                f"{seconds} s; 30 to 60 tokens wait, 50 ms each, in chunks so large that a late step counts little"
            )
        serving.wait(serving.is_empty)


@pytest.mark.parametrize("seed", [1, 2])
def test_overcommitted_pages_run_out_and_no_token_changes(seed: int) -> None:
    """Ten pages; eight sequences that grow to two or three pages are let in as if they stayed within one or two."""
    chance = random.Random(seed)
    decode = DecodeConfig(num_pages=10, num_slots=8, max_running=8, expected_output=0.05)
    with serving_with(decode, max_attempts=2) as serving, concurrent.futures.ThreadPoolExecutor(8) as pool:
        model, codec = NullRunner(num_pages=1, num_slots=1, max_model_len=2048), TextCodec(serving.model)
        prompts = [[chance.randrange(2, 500) for _ in range(chance.randrange(100, 250))] for _ in range(16)]

        def client(prompt: list[int]) -> dict[str, Any]:
            return serving.complete(prompt=prompt, max_tokens=300, ignore_eos=True, logprobs=0, temperature=0)

        answers = list(pool.map(client, prompts))
        for prompt, answer in zip(prompts, answers, strict=True):
            expected = model.continuation(prompt, SamplingParams(max_tokens=300, temperature=0.0, ignore_eos=True))
            assert answer["choices"][0]["logprobs"]["tokens"] == [codec.spelling(token) for token in expected]
            assert answer["usage"]["completion_tokens"] == 300
        page = serving.client.get("/metrics").text
        counts = {line.split()[0]: float(line.split()[1]) for line in page.splitlines() if line.startswith("baton_router_")}
        assert counts["baton_router_migrations_total"] == 0, "a preemption is no failure of a rank"
        assert counts["baton_router_preemptions_total"] > 0, "the pages sufficed; this test needs fewer"
        serving.wait(serving.is_empty)

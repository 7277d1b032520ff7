"""Delta hand-off over real transfers, in checked mode: what a decode rank still holds of a conversation does not travel again."""

from __future__ import annotations

import pytest

from core.kv_layout import PAGE_TOKENS
from core.request import SamplingParams
from router.config import RouterConfig
from tests.support.null_runner import NullRunner
from tests.support.serving import Serving

pytestmark = pytest.mark.e2e


def null_runner(role: str) -> NullRunner:
    return NullRunner(num_pages=40, num_slots=12, vocab_size=900, max_model_len=8192)


def bytes_sent(serving: Serving) -> int:
    """Of hand-offs that are over: each counts as a whole."""
    return serving.workers["prefill/0.0"].load().transfer_bytes_total


def test_only_the_missing_pages_of_the_next_turn_travel() -> None:
    runner = null_runner("")
    page_bytes, slot_bytes = runner.layout.page_bytes, runner.layout.slot_bytes
    with Serving(new_runner=null_runner, router=RouterConfig(default_thinking=False)) as serving:
        prompt, sent = [k % 800 for k in range(3 * PAGE_TOKENS + 50)], 0
        for turn, num_pages in enumerate((4, 2, 2)):
            sampling = SamplingParams(max_tokens=20, seed=turn, ignore_eos=True)
            body = {"prompt": prompt, "max_tokens": 20, "seed": turn, "ignore_eos": True, "logprobs": 0}
            answer = serving.complete(**body)["choices"][0]["logprobs"]["tokens"]
            expected = runner.continuation(prompt, sampling)
            assert answer == [serving.router._codec.spelling(token) for token in expected]
            serving.wait(lambda before=sent: bytes_sent(serving) > before)  # the prefill rank may hear of it after the client
            assert bytes_sent(serving) - sent == num_pages * page_bytes + slot_bytes, f"turn {turn}"
            sent = bytes_sent(serving)
            prompt = [*prompt, *expected, *((k * 7 + turn) % 800 for k in range(PAGE_TOKENS - 20))]
        serving.wait(serving.is_empty)

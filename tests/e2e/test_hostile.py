"""Ten thousand malformed requests: only refusals, nothing stuck, nothing leaked, and good requests still get their tokens."""

from __future__ import annotations

import asyncio
import collections

import pytest

from tests.support.fuzz_http import fuzz
from tests.support.null_runner import NullRunner
from tests.support.patience import overload
from tests.support.serving import Serving

pytestmark = pytest.mark.e2e

NUM_REQUESTS = 10_000


def new_runner(role: str) -> NullRunner:
    return NullRunner(num_pages=128 if role == "prefill" else 256, num_slots=24, vocab_size=1024, max_model_len=4096)


def test_hostile_requests_get_4xx_and_leave_nothing() -> None:
    with Serving(new_runner=new_runner) as serving:
        before = serving.complete(prompt=[5, 6, 7], max_tokens=8, seed=1, ignore_eos=True)["choices"][0]["text"]
        counts = asyncio.run(fuzz(serving.url, NUM_REQUESTS, seed=3, model="demo", timeout_s=60 * overload()))
        statuses = sum(counts.values(), collections.Counter())
        print({kind: dict(found) for kind, found in counts.items()})
        assert sum(statuses.values()) == NUM_REQUESTS
        assert not [status for status in statuses if status == "stuck" or status.startswith("5")], counts
        assert sum(statuses[status] for status in ("400", "404", "405", "413")) > NUM_REQUESTS / 2
        serving.wait(serving.is_empty)
        after = serving.complete(prompt=[5, 6, 7], max_tokens=8, seed=1, ignore_eos=True)["choices"][0]["text"]
        assert after == before

"""A request whose logits are not finite fails alone, on either kind of rank; a rank that gives nothing else gives itself up. No threads."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from core.errors import InternalError
from core.metrics import new_registry
from core.request import Member, Request, Reservation, SamplingParams
from core.session import Outbox
from decode_worker.config import DecodeConfig
from decode_worker.loop import DecodeLoop
from decode_worker.metrics import DecodeMetrics
from engine.batch import Chunk
from engine.failed_steps import MAX_FAILED_STEPS
from engine.parallel.lockstep import SoloSteps
from engine.runner import ChunkResult
from kv_transfer.receiver import Committed
from prefill_worker.config import PrefillConfig
from prefill_worker.loop import PrefillLoop
from prefill_worker.metrics import PrefillMetrics
from protos import decode_pb2, prefill_pb2
from tests.support.manual_clock import ManualClock
from tests.support.null_runner import NullRunner, prefix_hashes

DECODE = Member(role="decode", replica=0, rank=0, address="d:1", incarnation=7)
PROMPT = (5, 6, 7)


class LosingRunner(NullRunner):
    """Requests whose name begins with "bad" get no token, nor do those that are `lost`."""

    lost = ""

    def _run(self, chunk: Chunk) -> ChunkResult | None:
        name = chunk.sequence.request_id
        is_lost = name.startswith("bad") or name == self.lost
        return ChunkResult(chunk.sequence, error=InternalError(f"{name} is lost")) if is_lost else super()._run(chunk)


class Recorder:
    """A sender or receiver that only writes down what it is told."""

    def __init__(self) -> None:
        self.orders: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: self.orders.append((name, *arguments))


def new_runner(overlap: bool = False) -> LosingRunner:
    return LosingRunner(num_pages=16, num_slots=8, vocab_size=100, max_model_len=1024, overlap=overlap)


def request_of(name: str, prompt: tuple[int, ...] = PROMPT) -> Request:
    return Request(request_id=name, token_ids=prompt, prompt_len=len(prompt), sampling=SamplingParams(max_tokens=9, ignore_eos=True))


@pytest.fixture
def event_loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


class DecodeRank:
    def __init__(self, event_loop: asyncio.AbstractEventLoop, overlap: bool) -> None:
        self.runner = new_runner(overlap)
        config, metrics = DecodeConfig(num_pages=16, num_slots=8), DecodeMetrics(new_registry())
        self.loop = DecodeLoop(self.runner, config, 15.0, metrics, DECODE, SoloSteps(8), ManualClock(), pytest.fail)
        self.receiver = Recorder()
        self.loop._receiver = self.receiver  # type: ignore[assignment]
        self.outbox = Outbox(decode_pb2.DecodeUpdate, event_loop)

    def begin(self, *names: str, prompt: tuple[int, ...] = PROMPT) -> None:
        """They have arrived from a prefill rank."""
        for name in names:
            request = request_of(name, prompt)
            self.loop._reserve(request, self.outbox)
            held = self.loop._reservations.get(name)
            assert held is not None
            hashes = prefix_hashes(list(prompt))
            for number, page in enumerate(held.page_ids):
                rows = self.runner._rows(hashes[1:])[256 * number : 256 * (number + 1)]
                self.runner._pages[page, : len(rows)] = rows
            self.runner._write_slot(held.slot_id, len(prompt), hashes[len(prompt)])
            self.loop._transfer_event(Committed(held.epoch, self.runner.next_token(list(prompt), request.sampling)))

    def turns(self, count: int) -> None:
        for _ in range(count):
            self.loop._turn()

    def told(self) -> tuple[set[str], dict[str, int]]:
        """Requests that failed, and how many tokens each has got."""
        tokens: dict[str, int] = {}
        for one in self.outbox._pending.tokens:
            tokens[one.request_id] = tokens.get(one.request_id, 0) + len(one.token_ids)
        return {failure.request_id for failure in self.outbox._pending.failures}, tokens


@pytest.mark.parametrize("overlap", [False, True])
def test_decode_fails_the_one_and_the_others_run_to_their_ends(event_loop: asyncio.AbstractEventLoop, overlap: bool) -> None:
    rank = DecodeRank(event_loop, overlap)
    rank.begin("good.1", "bad.1", "good.2")
    rank.turns(12)
    assert rank.told() == ({"bad.1"}, {"good.1": 8, "good.2": 8})
    assert rank.loop._flight is None and not rank.loop._jobs and rank.loop.load.tokens_total == 16
    ends = [order for order in rank.receiver.orders if order[0] != "expect"]
    assert sorted(ends) == [("release", 1), ("release", 3), ("revoke", 2)], "also where the clock begins at 0"
    for epoch in list(rank.loop._reservations._quarantined):
        rank.loop._reservations.quiesced(epoch)
    rank.loop._reservations.check_integrity()
    assert rank.loop._reservations.pages.num_free == 16


@pytest.mark.parametrize("num_steps", [0, 2])
def test_the_pages_of_one_that_failed_are_not_kept_for_its_next_try(event_loop: asyncio.AbstractEventLoop, num_steps: int) -> None:
    """What lies in them may be why its logits are not finite. Those of the others of the step are kept."""
    rank = DecodeRank(event_loop, overlap=False)
    rank.begin("good", prompt=(5,) * 600)
    rank.begin("late", prompt=(6,) * 600)
    rank.turns(num_steps)
    rank.runner.lost = "late"
    rank.turns(12)
    assert rank.told() == ({"late"}, {"good": 8} | ({"late": num_steps} if num_steps else {}))
    reservations = rank.loop._reservations
    for epoch in list(reservations._quarantined):
        reservations.quiesced(epoch)
    assert reservations.pages.num_free == 16 and reservations.pages.num_kept == 2
    again = [reservations.reserve(request_of(f"{prompt[0]}", prompt), 0.0) for prompt in ((5,) * 600, (6,) * 600)]
    assert [held.num_kept_pages for held in again] == [2, 0]


@pytest.mark.parametrize("overlap", [False, True])
def test_decode_that_gives_no_token_at_all_gives_itself_up(event_loop: asyncio.AbstractEventLoop, overlap: bool) -> None:
    rank = DecodeRank(event_loop, overlap)
    for number in range(MAX_FAILED_STEPS - 1):
        rank.begin(f"bad.{number}")
        rank.turns(2)
    assert len(rank.told()[0]) == MAX_FAILED_STEPS - 1
    rank.begin("bad.last")
    with pytest.raises(InternalError, match=r"3 steps in a row failed.*bad\.last is lost"):
        rank.turns(2)


class PrefillRank:
    def __init__(self, event_loop: asyncio.AbstractEventLoop) -> None:
        config, metrics = PrefillConfig(num_pages=16, num_slots=8, chunk_tokens=256), PrefillMetrics(new_registry())
        self.loop = PrefillLoop(new_runner(), config, metrics, SoloSteps(256), ManualClock(), pytest.fail)
        self.loop._hand_offs.use(Recorder())  # type: ignore[arg-type]
        self.outbox = Outbox(prefill_pb2.PrefillUpdate, event_loop)

    def begin(self, *names: str) -> None:
        for name in names:
            reservation = Reservation(request_id=name, decode=DECODE, epoch=1, page_ids=(0,), slot_id=0, lease_s=5.0)
            self.loop._accept(request_of(name), reservation, self.outbox)


def test_prefill_fails_the_one_and_the_others_have_their_first_token(event_loop: asyncio.AbstractEventLoop) -> None:
    rank = PrefillRank(event_loop)
    rank.begin("good.1", "bad.1", "good.2")
    rank.loop._turn()
    update = rank.outbox._pending
    assert [failure.request_id for failure in update.failures] == ["bad.1"] and update.failures[0].error.code == "InternalError"
    assert [first.tokens.request_id for first in update.first_tokens] == ["good.1", "good.2"]


def test_prefill_that_gives_no_token_at_all_gives_itself_up(event_loop: asyncio.AbstractEventLoop) -> None:
    rank = PrefillRank(event_loop)
    for number in range(MAX_FAILED_STEPS - 1):
        rank.begin(f"bad.{number}")
        rank.loop._turn()
    rank.begin("good")
    rank.loop._turn()
    for number in range(MAX_FAILED_STEPS - 1):
        rank.begin(f"bad.more.{number}")
        rank.loop._turn()
    rank.begin("bad.last")
    with pytest.raises(InternalError, match="3 steps in a row failed"):
        rank.loop._turn()

"""What a prefill rank has computed outlives a hand-off that fails. A null runner and a sender that records its orders; no thread."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any, cast

import pytest

from core.errors import MemberLost, TransferFailed
from core.kv_layout import PAGE_TOKENS
from core.metrics import new_registry
from core.request import Member, Request, Reservation, SamplingParams
from core.session import Outbox
from engine.parallel.lockstep import SoloSteps
from kv_transfer.sender import Closed, CommitOrder
from kv_transfer.sending import KVSender
from prefill_worker.config import PrefillConfig
from prefill_worker.loop import PrefillLoop
from prefill_worker.metrics import PrefillMetrics
from protos import prefill_pb2
from tests.support.manual_clock import ManualClock
from tests.support.null_runner import NullRunner

NUM_PAGES, NUM_TOKENS, TOKEN_S = 8, 3 * PAGE_TOKENS - 10, 0.01
DECODE = Member(role="decode", replica=0, rank=0, address="d:1", incarnation=7)


class RecordingSender:
    def __init__(self) -> None:
        self.orders: list[tuple[Any, ...]] = []

    def open(self, request_id: str, reservation: Reservation) -> None:
        self.orders.append(("open", request_id, reservation.epoch))

    def push_pages(self, request_id: str, first_page: int, local_page_ids: list[int]) -> None:
        self.orders.append(("push", request_id, first_page, len(local_page_ids)))

    def commit(self, request_id: str, order: CommitOrder) -> None:
        self.orders.append(("commit", request_id, order))

    def abort(self, request_id: str) -> None:
        self.orders.append(("abort", request_id))

    def taken(self) -> list[tuple[Any, ...]]:
        taken, self.orders = self.orders, []
        return taken


class Rank:
    def __init__(self) -> None:
        self.clock = ManualClock()
        self.runner = NullRunner(
            num_pages=NUM_PAGES, num_slots=2, vocab_size=100, max_model_len=4096, token_s=TOKEN_S, sleep=self.clock.advance
        )
        config = PrefillConfig(num_pages=NUM_PAGES, num_slots=2, chunk_tokens=PAGE_TOKENS, max_waiting=1)
        self.loop = PrefillLoop(
            self.runner, config, PrefillMetrics(new_registry()), SoloSteps(PAGE_TOKENS), self.clock, on_death=pytest.fail
        )
        self.sender = RecordingSender()
        self.loop._hand_offs.use(cast(KVSender, self.sender))
        self.outbox = Outbox(prefill_pb2.PrefillUpdate, asyncio.new_event_loop())

    def turn(self) -> None:
        assert self.loop._thread._run_orders(0.0)
        self.loop._turn()

    def run(self, request_id: str = "r.1") -> None:
        tokens = tuple(k % 100 for k in range(NUM_TOKENS))
        sampling = SamplingParams(max_tokens=9, ignore_eos=True)
        request = Request(request_id=request_id, token_ids=tokens, prompt_len=NUM_TOKENS, sampling=sampling)
        self.loop.run(request, granted(request_id), self.outbox)

    def turns(self, count: int) -> None:
        for _ in range(count):
            self.turn()

    def close(self, hand_off: str, error: Exception | None) -> None:
        self.loop.transfer_event(Closed(hand_off, error))  # type: ignore[arg-type]
        self.turn()

    def updates(self) -> prefill_pb2.PrefillUpdate:
        update, self.outbox._pending = self.outbox._pending, prefill_pb2.PrefillUpdate()
        return cast(prefill_pb2.PrefillUpdate, update)


@pytest.fixture
def rank() -> Any:
    rank = Rank()
    yield rank
    rank.outbox._loop.close()


def granted(request_id: str, num_pages: int = 3) -> Reservation:
    return Reservation(
        request_id=request_id, decode=DECODE, epoch=int(request_id[-1]), page_ids=tuple(range(num_pages)), slot_id=0, lease_s=5.0
    )


def test_a_failed_hand_off_keeps_the_pages_and_the_next_reservation_gets_them_all(rank: Rank) -> None:
    rank.run()
    rank.turns(4)
    order = rank.sender.taken()[-1][2]
    steps = rank.loop._steps
    rank.close("r.1", MemberLost("gone"))
    (failed,) = rank.updates().hand_offs_failed
    assert (failed.request_id, failed.reserved_as, failed.error.code) == ("r.1", "r.1", "MemberLost")
    assert rank.loop.load.pages_free == NUM_PAGES - 3
    rank.loop.hand_on("r.1", granted("r.2"), rank.outbox)
    rank.turn()
    assert rank.sender.taken() == [("open", "r.2", 2), ("push", "r.2", 0, 3), ("commit", "r.2", order)]
    rank.close("r.2", None)
    assert rank.loop.is_idle and rank.loop.load.pages_free == NUM_PAGES
    assert rank.loop._steps == steps, "nothing was computed again"


def test_the_sender_has_the_commit_before_the_router_is_told_the_first_token(rank: Rank, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Any, ...]] = []
    monkeypatch.setattr(rank.outbox, "post", lambda update: seen.append(rank.sender.orders[-1]) if update.first_tokens else None)
    rank.run()
    rank.turns(4)
    assert [order[0] for order in seen] == ["commit"]


def test_computing_goes_on_without_a_place_to_send_to(rank: Rank) -> None:
    rank.run()
    rank.turns(1)
    assert rank.sender.taken() == [("open", "r.1", 1), ("push", "r.1", 0, 1)]
    rank.close("r.1", TransferFailed("cut"))
    rank.turns(1)
    assert rank.sender.taken() == [], "nobody to send to"
    rank.loop.hand_on("r.1", granted("r.2"), rank.outbox)
    rank.turns(2)
    taken = rank.sender.taken()
    assert taken[0] == ("open", "r.2", 2) and taken[-1][0] == "commit"
    assert sum(order[3] for order in taken if order[0] == "push") == 3
    assert rank.updates().first_tokens[0].tokens.request_id == "r.1"


def test_an_open_hand_off_ends_before_the_next_begins(rank: Rank) -> None:
    rank.run()
    rank.turns(4)
    rank.sender.taken()
    rank.loop.hand_on("r.1", granted("r.2"), rank.outbox)
    rank.turn()
    assert rank.sender.taken() == [("abort", "r.1")]
    rank.close("r.1", MemberLost("aborted"))
    assert rank.sender.taken()[0] == ("open", "r.2", 2)
    assert not rank.updates().hand_offs_failed, "the router has given it up itself"


def test_a_decode_rank_that_takes_over_just_after_it_was_given_up_costs_the_next_one_nothing(rank: Rank) -> None:
    rank.run()
    rank.turns(4)
    order = rank.sender.taken()[-1][2]
    rank.loop.hand_on("r.1", granted("r.2"), rank.outbox)
    rank.turn()
    rank.sender.taken()
    rank.close("r.1", None)
    assert rank.sender.taken() == [("open", "r.2", 2), ("push", "r.2", 0, 3), ("commit", "r.2", order)]
    rank.close("r.2", None)
    assert rank.loop.is_idle and rank.loop.load.pages_free == NUM_PAGES


def test_cancelling_a_kept_request_frees_its_pages_at_once(rank: Rank) -> None:
    rank.run()
    rank.turns(4)
    rank.close("r.1", MemberLost("gone"))
    rank.loop.cancel(["r.1"], rank.outbox)
    rank.turn()
    assert rank.loop.is_idle and rank.loop.load.pages_free == NUM_PAGES


def test_a_request_that_fails_or_is_cancelled_counts_once_as_that(rank: Rank) -> None:
    rank.run()
    rank.turns(4)
    rank.loop.cancel(["r.1"], rank.outbox)
    rank.loop.cancel(["r.1"], rank.outbox)  # while the sender lets go of it
    rank.turn()
    rank.close("r.1", TransferFailed("aborted"))
    for end in (lambda: rank.clock.advance(601), lambda: rank.loop.session_closed(rank.outbox)):
        rank.run()
        rank.turn()
        end()
        rank.turn()
        rank.close("r.1", TransferFailed("aborted"))
    counted = {
        sample.labels["outcome"]: sample.value
        for metric in rank.loop._metrics.requests.collect()
        for sample in metric.samples
        if sample.name.endswith("_total")
    }
    assert rank.loop.is_idle and counted == {"cancelled": 2, "failed": 1}


def test_kept_pages_have_a_deadline(rank: Rank) -> None:
    rank.run()
    rank.turns(4)
    rank.close("r.1", MemberLost("gone"))
    rank.clock.advance(601)
    rank.turn()
    assert rank.loop.is_idle
    assert rank.updates().failures[0].error.code == "DeadlineExceeded"


def test_what_is_not_kept_cannot_be_handed_on(rank: Rank) -> None:
    rank.run()
    rank.turns(4)
    rank.close("r.1", None)
    rank.loop.hand_on("r.1", granted("r.2"), rank.outbox)
    rank.turn()
    (failure,) = rank.updates().failures
    assert failure.error.code == "TransferFailed", "which the router answers by running it anew"


def test_a_reservation_that_does_not_fit_is_refused_and_the_job_stays(rank: Rank) -> None:
    rank.run()
    rank.turns(4)
    rank.close("r.1", MemberLost("gone"))
    rank.updates()
    rank.loop.hand_on("r.1", granted("r.2", num_pages=2), rank.outbox)
    rank.turn()
    assert rank.updates().failures[0].error.code == "InternalError"
    assert not rank.loop.is_idle


def test_another_router_cannot_hand_it_on(rank: Rank) -> None:
    rank.run()
    rank.turns(4)
    rank.close("r.1", MemberLost("gone"))
    rank.sender.taken()
    other = Outbox(prefill_pb2.PrefillUpdate, rank.outbox._loop)
    rank.loop.hand_on("r.1", granted("r.2"), other)
    rank.turn()
    assert other._pending.failures and not rank.sender.taken()


def test_pages_that_the_decode_rank_has_are_not_sent(rank: Rank) -> None:
    tokens = tuple(k % 100 for k in range(NUM_TOKENS))
    request = Request(request_id="r.1", token_ids=tokens, prompt_len=NUM_TOKENS, sampling=SamplingParams(max_tokens=9, ignore_eos=True))
    rank.loop.run(request, dataclasses.replace(granted("r.1"), num_kept_pages=1), rank.outbox)
    rank.turns(4)
    taken = rank.sender.taken()
    assert [order[2:] for order in taken if order[0] == "push"] == [(1, 1), (2, 1)]
    assert taken[-1][0] == "commit"
    rank.close("r.1", MemberLost("gone"))
    rank.loop.hand_on("r.1", granted("r.2"), rank.outbox)
    rank.turn()
    assert ("push", "r.2", 0, 3) in rank.sender.taken(), "another decode rank has nothing of it"


def test_a_full_rank_tells_how_long_what_waits_takes_from_its_first_steps_on(rank: Rank) -> None:
    for name in ("r.1", "r.2", "r.3"):
        rank.run(name)
        rank.turn()
    assert not rank.updates().failures
    left = rank.loop.load.waiting_tokens
    assert rank.loop.load.num_waiting == 1 and left > NUM_TOKENS
    rank.run("r.4")
    rank.turn()
    (refused,) = rank.updates().failures
    assert (refused.request_id, refused.error.code) == ("r.4", "Overloaded")
    assert refused.error.retry_after_s == pytest.approx(left * TOKEN_S)

"""The loops of a group's ranks, with votes that arrive in any order: all take the same steps, and nobody sleeps while there is work.

The real loops and `GroupSteps`, over connections that hold a message until it is read. No threads: a rank takes a turn when something has
happened to it, or its last turn left more to do. Nobody looks at the clock, so a rank that is not woken sleeps for ever.
"""

from __future__ import annotations

import asyncio
import random
import socket
from collections import deque
from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

from core.metrics import new_registry
from core.request import Member, Request, Reservation, SamplingParams
from core.session import Outbox
from decode_worker.config import DecodeConfig
from decode_worker.loop import DecodeLoop
from decode_worker.metrics import DecodeMetrics
from engine.batch import Chunk
from engine.parallel.lockstep import GroupSteps
from engine.parallel.steps import batch_bucket, even_budget
from engine.runner import Launched
from kv_transfer.receiver import Committed, Quiesced
from kv_transfer.sender import Closed
from prefill_worker.config import PrefillConfig
from prefill_worker.loop import PrefillLoop
from prefill_worker.metrics import PrefillMetrics
from protos import decode_pb2, prefill_pb2
from tests.support.manual_clock import ManualClock
from tests.support.null_runner import NullRunner, prefix_hashes

DECODE = Member(role="decode", replica=0, rank=0, address="d:1", incarnation=7)
NUM_PAGES, NUM_SLOTS, MOST = 3, 6, {"decode": 4, "prefill": 256}
ROUNDS = 450


class Link:
    """One end of a connection."""

    def __init__(self) -> None:
        self.inbox: deque[bytes] = deque()
        self.peer: Link | None = None

    def sendall(self, message: bytes) -> None:
        assert self.peer is not None
        self.peer.inbox.append(message)

    def recv(self, size: int) -> bytes:
        message = self.inbox.popleft()
        assert len(message) == size
        return message


class StepRunner(NullRunner):
    """Takes steps without chunks, too, and remembers the budget of each."""

    budgets: list[int]

    def launch(self, chunks: list[Chunk], budget: int = 0) -> Launched:
        assert sum(chunk.length for chunk in chunks) <= budget
        self.budgets.append(budget)
        return super().launch(chunks, budget) if chunks else Launched(chunks)


class Rank:
    """`live`: request id -> request and the tokens it has got."""

    def __init__(self, role: str, steps: GroupSteps, clock: ManualClock, overlap: bool, event_loop: asyncio.AbstractEventLoop) -> None:
        self.steps, self.is_awake = steps, True
        self.runner = StepRunner(num_pages=NUM_PAGES, num_slots=NUM_SLOTS, vocab_size=50, max_model_len=1024, overlap=overlap)
        self.runner.budgets = []
        self.live: dict[str, tuple[Request, list[int]]] = {}
        self.num_finished = self.num_preempted = 0
        self.aborted: list[str] = []
        self.loop: Any
        if role == "decode":
            config = DecodeConfig(num_pages=NUM_PAGES, num_slots=NUM_SLOTS, max_running=MOST[role], expected_output=0.1)
            self.loop = DecodeLoop(self.runner, config, 15.0, DecodeMetrics(new_registry()), DECODE, steps, clock, pytest.fail)
            self.loop._receiver = SimpleNamespace(expect=ignore, release=ignore, revoke=ignore)
            self.outbox = Outbox(decode_pb2.DecodeUpdate, event_loop)
        else:
            prefill = PrefillConfig(num_pages=NUM_PAGES, num_slots=NUM_SLOTS, chunk_tokens=MOST[role])
            self.loop = PrefillLoop(self.runner, prefill, PrefillMetrics(new_registry()), steps, clock, pytest.fail)
            over = self.aborted.append
            self.loop._hand_offs.use(SimpleNamespace(open=ignore, push_pages=ignore, commit=lambda name, _: over(name), abort=over))
            self.outbox = Outbox(prefill_pb2.PrefillUpdate, event_loop)

    def begin(self, request: Request) -> None:
        """On a decode rank it has just arrived; a rank without room refuses it."""
        self.is_awake = True
        if isinstance(self.loop, PrefillLoop):
            pages = tuple(range(-(-len(request.token_ids) // 256)))
            self.loop._accept(
                request,
                Reservation(request_id=request.request_id, decode=DECODE, epoch=1, page_ids=pages, slot_id=0, lease_s=9.0),
                self.outbox,
            )
            self.live[request.request_id] = request, []
            return
        self.loop._reserve(request, self.outbox)
        held, count = self.loop._reservations.get(request.request_id), len(request.token_ids)
        if held is None:
            return
        hashes = prefix_hashes(list(request.token_ids))
        rows = self.runner._rows(hashes[1:])
        for number, page in enumerate(held.page_ids):
            part = rows[256 * number : 256 * (number + 1)]
            self.runner._pages[page, : len(part)] = part
        self.runner._write_slot(held.slot_id, count, hashes[count])
        first = self.runner.next_token(list(request.token_ids), request.sampling)
        self.live[request.request_id] = request, [first]
        self.loop._transfer_event(Committed(held.epoch, first))

    def cancel(self, name: str) -> None:
        self.is_awake = True
        del self.live[name]
        self.loop._cancel([name], self.outbox)

    def let_go(self) -> None:
        """Nothing is written from, or to, pages of what has ended."""
        if isinstance(self.loop, PrefillLoop):
            self.is_awake |= bool(self.aborted)
            for name in self.aborted:
                if name in self.loop._hand_offs._open:
                    self.loop._hand_offs.closed(Closed(name, None))
            self.aborted.clear()
        else:
            for epoch in list(self.loop._reservations._quarantined):
                self.loop._transfer_event(Quiesced(epoch))

    def turn(self) -> None:
        self.is_awake = self.loop._turn() == 0.0
        update: Any = self.outbox._pending
        self.outbox._pending, self.outbox._bytes = type(update)(), 0
        for tokens in update.tokens if isinstance(self.loop, DecodeLoop) else [first.tokens for first in update.first_tokens]:
            self.live[tokens.request_id][1].extend(tokens.token_ids)
            if tokens.finish_reason or isinstance(self.loop, PrefillLoop):
                request, output = self.live.pop(tokens.request_id)
                expected = self.runner.continuation(list(request.token_ids), request.sampling)
                assert output == expected[: len(output)] and (isinstance(self.loop, PrefillLoop) or output == expected)
                self.num_finished += 1
        for failure in update.failures:
            assert failure.error.code in ("Preempted", "Overloaded"), failure
            self.num_preempted += failure.error.code == "Preempted"
            self.live.pop(failure.request_id, None)


def ignore(*arguments: object) -> None:
    pass


@pytest.fixture
def event_loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


def votes_of(role: str, size: int, clock: ManualClock, monkeypatch: pytest.MonkeyPatch) -> list[GroupSteps]:
    ends = [(Link(), Link()) for _ in range(size - 1)]
    for one, other in ends:
        one.peer, other.peer = other, one

    def connect(steps: GroupSteps, group: Any) -> None:
        links = dict(enumerate((one for one, _ in ends), 1)) if group.rank == 0 else {0: ends[group.rank - 1][1]}
        steps._links.update(links)  # type: ignore[arg-type]

    def budget_of(wanted: Any) -> int:
        return batch_bucket(wanted, MOST[role]) if role == "decode" else even_budget(wanted, MOST[role])

    monkeypatch.setattr(GroupSteps, "_connect", connect)
    monkeypatch.setattr("engine.parallel.lockstep.selectors.DefaultSelector", lambda: SimpleNamespace(register=ignore))
    monkeypatch.setattr(socket, "socketpair", lambda: (None, None))
    found = []
    for rank in range(size):
        seat = SimpleNamespace(rank=rank, member=f"{role}/0.{rank}", member_of=lambda other: f"{role}/0.{other}")
        group: Any = SimpleNamespace(
            seat=seat,
            rank=rank,
            size=size,
            limits=SimpleNamespace(step_s=20.0),
            lose=ignore,
            working=lambda _: nullcontext(),
            before_close=ignore,
        )
        found.append(GroupSteps(group, budget_of, clock))
    return found


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("role", ["decode", "prefill"])
def test_all_ranks_take_the_same_steps_and_all_work_ends(
    role: str, seed: int, event_loop: asyncio.AbstractEventLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng, clock = random.Random(seed), ManualClock()
    ranks = [
        Rank(role, steps, clock, role == "decode" and rng.random() < 0.7, event_loop)
        for steps in votes_of(role, rng.randint(2, 4), clock, monkeypatch)
    ]
    for number in range(100 * ROUNDS):
        some = rng.choice(ranks)
        if number < ROUNDS and rng.random() < 0.15:
            length = rng.choice((1, 240, 250, 255, 256))
            sampling = SamplingParams(max_tokens=rng.choice((2, 30, 40)), ignore_eos=True, seed=seed)
            ids = tuple(rng.randrange(2, 50) for _ in range(length))
            some.begin(Request(request_id=f"r{number}", token_ids=ids, prompt_len=length, sampling=sampling))
        if number < ROUNDS and rng.random() < 0.02 and some.live:
            some.cancel(rng.choice(list(some.live)))
        for rank in ranks:
            rank.let_go()
        unread = [(rank, peer, link) for rank in ranks for peer, link in rank.steps._links.items() if link.inbox]  # type: ignore[attr-defined]
        awake = [rank for rank in ranks if rank.is_awake]
        if unread and (not awake or rng.random() < 0.5):
            rank, peer, link = rng.choice(unread)
            rank.steps._read_from(peer, link)
            rank.is_awake = True
        elif awake:
            rng.choice(awake).turn()
        elif number >= ROUNDS:
            break
    assert not any(rank.live for rank in ranks), "all sleep, and there is work"
    budgets = [rank.runner.budgets for rank in ranks]
    assert len(budgets[0]) > 20 and all(taken == budgets[0] for taken in budgets)
    assert sum(rank.num_finished for rank in ranks) > 8
    assert all(rank.loop.is_idle for rank in ranks)
    assert role == "prefill" or sum(rank.num_preempted for rank in ranks) > 0

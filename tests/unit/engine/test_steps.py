"""Agreement on steps: nobody steps alone, nobody spins, and who keeps the others waiting is named."""

from __future__ import annotations

import pathlib
import random
import socket
import struct
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from core.clock import Clock, SystemClock
from core.errors import GroupLost
from core.metrics import new_registry
from engine.config import EngineConfig
from engine.engine import LoadedModel
from engine.parallel.experts import Sharing
from engine.parallel.group import Group, Limits
from engine.parallel.lockstep import GroupSteps, SoloSteps
from engine.parallel.steps import Go, StepBoard, batch_bucket, even_budget
from engine.rank_engine import RankEngine, Work
from tests.support.manual_clock import ManualClock
from tests.support.ranks import run_group, seats

LIMIT_S = 5.0


def test_a_step_begins_when_all_have_voted_and_one_has_work() -> None:
    board = StepBoard(3, max)
    assert board.vote(0, 0, 5, 0.0) is None and board.vote(2, 0, 0, 0.0) is None
    assert board.vote(1, 0, 9, 0.0) == Go(0, 9)
    assert board.step == 1


def test_nobody_steps_while_nobody_has_work_and_one_vote_wakes_all() -> None:
    board = StepBoard(2, max)
    assert board.vote(0, 0, 0, 0.0) is None and board.vote(1, 0, 0, 0.0) is None
    assert board.overdue(1e9, LIMIT_S) == ()
    assert board.vote(1, 0, 3, 1e9) == Go(0, 3)


def test_a_vote_may_be_replaced_until_the_step_is_decided() -> None:
    board = StepBoard(2, max)
    board.vote(0, 0, 5, 0.0)
    board.vote(0, 0, 0, 1.0)
    assert board.vote(1, 0, 0, 1.0) is None
    assert board.vote(1, 0, 2, 2.0) == Go(0, 2)
    assert board.vote(0, 0, 7, 3.0) is None and board.vote(0, 1, 0, 3.0) is None  # too late for step 0; a vote for step 1


def test_who_does_not_vote_while_another_waits_is_overdue() -> None:
    board = StepBoard(4, max)
    board.vote(1, 0, 0, 0.0)
    assert board.overdue(100.0, LIMIT_S) == ()  # nobody waits
    board.vote(2, 0, 1, 100.0)
    assert board.overdue(100.0 + LIMIT_S, LIMIT_S) == ()
    assert board.overdue(100.1 + LIMIT_S, LIMIT_S) == (0, 3)


@pytest.mark.parametrize(
    ("wanted", "budget"),
    [((256, 0), 256), ((256, 256), 256), ((256, 20), 138), ((256, 20, 20, 20), 79), ((10, 0), 64), ((256, 1, 1, 1, 1, 1, 1, 1), 64)],
)
def test_a_long_prompt_gives_way_to_short_ones_on_other_ranks(wanted: tuple[int, ...], budget: int) -> None:
    assert even_budget(wanted, 256) == budget


@pytest.mark.parametrize(("wanted", "bucket"), [((1, 0), 1), ((3, 2), 4), ((16, 1), 16), ((17, 1), 20), ((9, 0), 16)])
def test_the_bucket_covers_the_fullest_rank(wanted: tuple[int, ...], bucket: int) -> None:
    assert batch_bucket(wanted, 20) == bucket


@pytest.mark.parametrize("seed", range(100))
def test_in_any_order_of_votes_all_ranks_take_the_same_steps(seed: int) -> None:
    """A world of ranks whose messages to rank 0 are delayed as one likes; each rank follows the rules of GroupSteps."""
    rng = random.Random(seed)
    size = rng.randint(1, 6)
    board, now = StepBoard(size, max), 0.0
    work = [rng.randint(0, 5) for _ in range(size)]
    taken: list[list[tuple[int, int]]] = [[] for _ in range(size)]
    mail: list[list[tuple[int, int]]] = [[(0, work[rank])] for rank in range(size)]  # rank -> votes on their way, in order
    going: list[list[Go]] = [[] for _ in range(size)]
    arrivals, brought = 30, sum(work)
    while arrivals or any(mail) or any(going) or any(work):
        now += 0.1
        rank = rng.randrange(size)
        if arrivals and rng.random() < 0.1:
            arrivals -= 1
            was_idle = not work[rank]
            more = rng.randint(1, 3)
            work[rank], brought = work[rank] + more, brought + more
            if was_idle:
                mail[rank].append((len(taken[rank]), work[rank]))
        elif mail[rank]:
            decided = board.vote(rank, *mail[rank].pop(0), now)
            for inbox in going if decided else ():
                assert decided is not None
                inbox.append(decided)
        elif going[rank]:
            go = going[rank].pop(0)
            assert go.step == len(taken[rank])
            taken[rank].append((go.step, min(work[rank], go.budget)))
            work[rank] = max(0, work[rank] - go.budget)
            mail[rank].append((go.step + 1, work[rank]))
    assert len({len(steps) for steps in taken}) == 1
    assert sum(amount for steps in taken for _, amount in steps) == brought


def opened(group: Group, clock: Clock, wake: Callable[[], None]) -> GroupSteps:
    steps = GroupSteps(group, max, clock)
    steps.start(wake, pytest.fail)
    return steps


def follow(steps: GroupSteps, woken: threading.Event, wanted: int, pause: Callable[[], None] = lambda: None) -> None:
    """Ask until the group is lost, at most 4,000 times in 20 s or more."""
    for _ in range(4000):
        steps.agreed(wanted)
        pause()
        woken.wait(0.005)
        woken.clear()


@pytest.mark.parametrize("work", [(3, 0), (0, 4), (2, 5, 0, 1)], ids=str)
def test_over_real_connections_all_take_as_many_steps_as_the_busiest_needs(work: tuple[int, ...]) -> None:
    left = threading.Barrier(len(work))
    done = [0] * len(work)

    def rank(group: Group) -> list[int]:
        wake = threading.Event()
        steps = opened(group, SystemClock(), wake.set)
        budgets: list[int] = []
        mine = work[group.rank]
        end = time.monotonic() + 20
        while len(budgets) < max(work) and time.monotonic() < end:
            budget = steps.agreed(mine)
            if budget is None:
                wake.wait(0.02)
                wake.clear()
                continue
            budgets.append(budget)
            mine = max(0, mine - 1)
            steps.begin(mine)
        assert steps.agreed(0) is None
        done[group.rank] = len(budgets)
        left.wait(20)
        steps.close()
        return budgets

    results = run_group(len(work), rank)
    assert done == [max(work)] * len(work)
    assert all(budgets == results[0] for budgets in results) and results[0] == sorted(results[0], reverse=True)


def test_strangers_at_the_port_do_not_keep_a_group_from_forming() -> None:
    """One leaves at once, one sends what is no hello, one takes itself for a rank that there is not, and one says nothing for a while."""

    strangers: list[socket.socket] = []

    def rank(group: Group) -> int:
        if group.rank == 1:
            address = group.seat.rendezvous.rpartition(":")[0], int(group.store.get("votes"))
            strangers.extend(socket.create_connection(address) for _ in range(4))
            strangers[0].close()
            strangers[1].sendall(b"GET / HTTP/1.0\r\n\r\n")
            strangers[2].sendall(struct.pack("!BQI", 1, 0, 2))
            threading.Timer(0.05, strangers[3].close).start()
        steps = opened(group, SystemClock(), lambda: None)
        steps.close()
        return len(steps._links)

    assert run_group(2, rank) == [1, 1]
    for stranger in strangers:
        stranger.close()


def test_an_idle_group_sleeps_and_new_work_on_any_rank_wakes_it() -> None:
    slept, over = threading.Barrier(3), threading.Barrier(3)
    wakes, expected = [0, 0, 0], [3, 1, 1]

    def rank(group: Group) -> int:
        woken = threading.Event()

        def wake() -> None:
            wakes[group.rank] += 1
            woken.set()

        steps = opened(group, SystemClock(), wake)
        assert steps.agreed(0) is None
        end = time.monotonic() + 20
        while group.rank == 0 and wakes[0] < 2 and time.monotonic() < end:
            woken.wait(0.02)  # both others' votes
            woken.clear()
        slept.wait(20)
        if group.rank == 2:
            steps.agreed(7)
        end = time.monotonic() + 20
        while (budget := steps.agreed(7 if group.rank == 2 else 0)) is None and time.monotonic() < end:
            woken.wait(0.02)
        assert budget == 7
        while wakes[group.rank] < expected[group.rank] and time.monotonic() < end:
            time.sleep(0.001)  # who asks by itself may know before it is woken
        number = wakes[group.rank]
        over.wait(20)
        steps.close()
        return number

    assert run_group(3, rank) == expected  # at rank 0 two idle votes, then that of rank 2; its word to go at the others


def test_a_dead_rank_is_named_on_every_other_rank_and_what_waits_on_a_device_is_told() -> None:
    def rank(group: Group) -> str:
        woken, told = threading.Event(), threading.Event()
        group.when_lost(told.set)
        steps = opened(group, SystemClock(), woken.set)
        if group.rank == 1:
            for link in steps._links.values():
                link.shutdown(socket.SHUT_RDWR)  # as the kernel does for a process that was killed
            return "dead"
        with pytest.raises(GroupLost, match=r"decode/0\.[02]: decode/0\.1 of its group is gone or stuck"):
            follow(steps, woken, 0)
        assert told.is_set()
        return "noticed"

    assert run_group(3, rank) == ["noticed", "dead", "noticed"]


def test_a_rank_whose_start_fails_hangs_up_and_the_others_know() -> None:
    """Its process may live on for a while: the model did not fit, say."""

    def rank(group: Group) -> list[int]:
        steps = GroupSteps(group, max, SystemClock())
        if group.rank == 1:
            group.close()  # it never came to `start`
            return [link.fileno() for link in (*steps._links.values(), steps._stop_sender, steps._stop_receiver)]
        woken = threading.Event()
        steps.start(woken.set, pytest.fail)
        with pytest.raises(GroupLost, match=r"decode/0\.1 of its group is gone or stuck"):
            follow(steps, woken, 0)
        steps.close()
        group.close()
        return []

    assert run_group(2, rank) == [[], [-1, -1, -1]]


def work_of_two(new_runner: Callable[..., Any]) -> Work:
    """That of a decode group of two ranks."""
    return Work(
        role="decode",
        ranks_per_replica=2,
        attention_tp=1,
        redundant_experts=0,
        max_tokens=4,
        budget_of=batch_bucket,
        is_latency_bound=True,
        new_runner=new_runner,
    )


def test_a_rank_that_does_not_get_its_connection_for_votes_leaves_its_group(monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[int] = []
    true_close = Group.close
    monkeypatch.setattr(Group, "close", lambda group: (closed.append(group.rank), true_close(group))[0])

    def connect(steps: GroupSteps, group: Group) -> None:
        raise ConnectionRefusedError(111, "nobody listens")

    monkeypatch.setattr(GroupSteps, "_connect", connect)
    rendezvous, places = seats(1)
    work = work_of_two(pytest.fail)
    with pytest.raises(GroupLost, match=r"connection for votes.*nobody listens"):
        RankEngine.join(work, places[0], rendezvous, EngineConfig(), SystemClock())
    assert closed == [0]


def test_no_rank_takes_a_step_to_measure_before_all_have_read_their_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """The step would wait for the others for no longer than a step's time, and reading can take one rank minutes longer."""
    have_read, is_first = set[int](), threading.Event()

    def load(folder: pathlib.Path, config: EngineConfig, sharing: Sharing) -> Any:
        if sharing.group.rank == 1:
            assert is_first.wait(20)
            time.sleep(0.03)  # the other one would be at its step by now
        have_read.add(sharing.group.rank)
        is_first.set()
        return SimpleNamespace(engine=config, share=None, heads=None)

    def new_runner(loaded: Any) -> Any:
        assert have_read == {0, 1}, f"only {have_read} have read their weights"

    monkeypatch.setattr(LoadedModel, "load", load)
    work = work_of_two(new_runner)

    def rank(group: Group) -> None:
        engine = RankEngine(work, EngineConfig(), group, GroupSteps(group, max, SystemClock()))
        engine.load(pathlib.Path("none"), new_registry(), pytest.fail)
        engine.close()

    run_group(2, rank)


def test_a_stuck_rank_is_named_after_the_deadline() -> None:
    over = threading.Event()

    def rank(group: Group) -> None:
        clock = ManualClock()
        woken = threading.Event()
        steps = opened(group, clock, woken.set)
        if group.rank == 1:
            over.wait(20)  # never votes
            return
        with pytest.raises(GroupLost, match=r"decode/0\.1"):
            follow(steps, woken, group.rank, lambda: clock.advance(0.1 if group.rank == 0 else 0.001))
        if group.rank == 2:
            over.set()

    run_group(3, rank, Limits(start_s=20.0, step_s=LIMIT_S))


@pytest.mark.parametrize("asks_for_the_next", [False, True])
def test_a_step_that_does_not_end_is_noticed_while_the_rank_is_in_it(asks_for_the_next: bool) -> None:
    over = threading.Event()

    def rank(group: Group) -> list[str]:
        reasons: list[str] = []
        noticed, clock = threading.Event(), ManualClock()
        steps = GroupSteps(group, max, clock)
        steps.start(lambda: None, lambda reason: (reasons.append(reason), noticed.set())[0])
        end = time.monotonic() + 20
        while steps.agreed(1) is None and time.monotonic() < end:
            time.sleep(0.005)
        steps.begin(1)
        if asks_for_the_next:
            steps.agreed(1, is_computing=True)
        clock.advance(2.9)
        if group.rank == 1:
            clock.advance(0.2)
            noticed.wait(20)
            over.set()
        over.wait(20)
        steps.close()
        return reasons

    assert run_group(2, rank, Limits(start_s=20.0, step_s=1.0)) == [[], ["decode/0.1: a step takes over 3 s"]]


def test_a_rank_that_leaves_releases_what_waits_on_a_device_there_and_at_its_peers() -> None:
    opened_by_all = threading.Barrier(3)

    def rank(group: Group) -> bool:
        told = threading.Event()
        group.when_lost(told.set)
        steps = opened(group, SystemClock(), lambda: None)
        assert not told.is_set()
        opened_by_all.wait(20)
        if group.rank != 1:
            assert told.wait(20), "before it leaves itself: its thread may be in a step that rank 1 does not take"
        steps.close()
        return told.is_set()

    assert run_group(3, rank) == [True] * 3


def test_a_rank_that_leaves_on_purpose_is_no_failure() -> None:
    left = threading.Event()

    def rank(group: Group) -> bool:
        woken = threading.Event()
        steps = opened(group, SystemClock(), woken.set)
        if group.rank == 1:
            steps.close()
            left.set()
            return True
        left.wait(20)
        end = time.monotonic() + 20
        while not steps.is_ending and time.monotonic() < end:
            woken.wait(0.02)
        assert steps.agreed(3) is None
        steps.close()
        return steps.is_ending

    assert run_group(3, rank) == [True] * 3


def test_a_rank_alone_steps_when_it_wants_to() -> None:
    steps = SoloSteps(16)
    assert steps.agreed(0) is None and steps.agreed(3) == 16
    steps.begin(0)
    steps.close()

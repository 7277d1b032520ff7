"""A prefill group of two that attend together, and a decode group of four processes: ranks that die or freeze take their group with them,
and no token is wrong.

tests/e2e/test_groups.py has the comparison of tokens for many prompts.
"""

from __future__ import annotations

import os
import pathlib
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from deploy.config import PlacementConfig
from tests.support.cluster import Cluster, kill
from tests.support.patience import overload

pytestmark = pytest.mark.e2e

BACK_WITHIN_S = 60
NUM_CLIENTS = 6
PROMPTS = [f"Request {number}: the river that" for number in range(NUM_CLIENTS)]
TOKENS = 40


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    found = Cluster(tmp_path_factory.mktemp("groups"), "groups")
    try:
        print(
            found.up(
                "prefill.ranks_per_replica=2",
                "prefill.attention_tp=2",
                "decode.ranks_per_replica=4",
                "decode.num_pages=64",
                "decode.num_slots=8",
                "router.wait_for_members_s=300",
                f"placement.health_timeout_s={PlacementConfig().health_timeout_s}",  # the default: one of them freezes
            )
        )
        yield found
    finally:
        found.down()


@pytest.fixture
def settled(cluster: Cluster) -> Cluster:
    cluster.wait_until_settled(BACK_WITHIN_S)
    return cluster


def ranks_of(cluster: Cluster, role: str) -> dict[str, int]:
    return {name: int(row.pid) for name, row in cluster.rows().items() if row.member.role == role}


class Clients:
    """Streams of all prompts at once; texts by prompt, a failure as the end of the text."""

    def __init__(self, cluster: Cluster) -> None:
        self.texts: dict[str, list[str]] = {prompt: [] for prompt in PROMPTS}
        self._threads = [threading.Thread(target=self._run, args=(cluster, prompt)) for prompt in PROMPTS]
        for thread in self._threads:
            thread.start()

    def _run(self, cluster: Cluster, prompt: str) -> None:
        try:
            for text in cluster.complete(prompt, TOKENS, timeout_s=240):
                self.texts[prompt].append(text)
        except (AssertionError, OSError, ValueError) as error:
            self.texts[prompt].append(f"FAILED {error!r}")

    def wait_until_all_have(self, num_texts: int) -> None:
        end = time.monotonic() + 60 * overload()
        while min(map(len, self.texts.values())) < num_texts:
            assert time.monotonic() < end, self.texts
            time.sleep(0.01)

    def results(self) -> dict[str, str]:
        for thread in self._threads:
            thread.join(240 * overload())
            assert not thread.is_alive(), f"a stream does not end: {self.texts}"
        return {prompt: "".join(parts) for prompt, parts in self.texts.items()}


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster) -> dict[str, str]:
    texts = Clients(cluster).results()
    assert "FAILED" not in "".join(texts.values()) and all(texts.values())
    return texts


def test_every_rank_of_the_group_is_a_member_and_gets_requests(settled: Cluster, undisturbed: dict[str, str]) -> None:
    assert sorted(ranks_of(settled, "decode")) == [f"decode/0.{rank}" for rank in range(4)]
    assert undisturbed and settled.rows()["prefill/0.1"].note == "computes heads for prefill/0.0"
    settled.wait(
        lambda: all(row.load.tokens_total for row in settled.rows().values() if row.member.role == "decode"),
        "every rank of the group has had something to do",
    )


@pytest.mark.parametrize(
    ("victim", "how"),
    [("decode/0.2", signal.SIGKILL), ("decode/0.0", signal.SIGKILL), ("decode/0.1", signal.SIGSTOP), ("prefill/0.1", signal.SIGKILL)],
    ids=str,
)
def test_a_lost_rank_costs_a_pause_and_its_whole_group_comes_back(
    settled: Cluster, undisturbed: dict[str, str], victim: str, how: signal.Signals
) -> None:
    role = victim.partition("/")[0]
    before = {one: ranks_of(settled, one) for one in ("prefill", "decode")}
    lost = before.pop(role)
    clients = Clients(settled)
    if role == "decode":
        clients.wait_until_all_have(3)
    os.kill(lost[victim], how)
    seconds = settled.wait_until_settled(BACK_WITHIN_S, frozenset(lost.values()))
    print(f"{role} group back after {seconds:.1f} s")
    assert clients.results() == undisturbed
    for other, ranks in before.items():
        assert ranks_of(settled, other) == ranks, f"other groups go on\n{settled.logs()}"
    settled.wait(lambda: not any(pathlib.Path(f"/proc/{pid}").exists() for pid in lost.values()), f"{lost} have ended")
    settled.wait(lambda: all(map(is_empty, settled.rows().values())), "all pages and slots are free", EMPTY_S)


EMPTY_S = 40.0
"""What a lost sender may still have written to is in quarantine first."""


def is_empty(row: Any) -> bool:
    if row.member.role == "router":
        return True
    return bool(row.load.pages_free == row.load.pages_total and row.load.slots_free == row.load.slots_total)


def test_survivors_of_a_killed_rank_say_who_was_lost(settled: Cluster) -> None:
    before = ranks_of(settled, "decode")
    logs = [settled.folder.logs / f"decode-0.{rank}.log" for rank in range(3)]

    starts = {log: log.stat().st_size for log in logs}

    def is_said() -> bool:
        new = "".join(log.read_bytes()[start:].decode() for log, start in starts.items())
        lines = [line for line in new.splitlines() if "rank.failed" in line and "GroupLost" in line]
        return any("decode/0.3 of its group is gone" in line for line in lines)

    assert not is_said()
    controller = settled.controller_pid()
    os.kill(controller, signal.SIGSTOP)  # it would end them as soon as it knows, which may be before they do
    try:
        kill(before["decode/0.3"])
        settled.wait(is_said, "a survivor says who was lost")
    finally:
        os.kill(controller, signal.SIGCONT)
    settled.wait_until_settled(BACK_WITHIN_S, frozenset(before.values()))


def test_a_new_controller_adopts_the_groups(settled: Cluster, undisturbed: dict[str, str]) -> None:
    before = {role: ranks_of(settled, role) for role in ("prefill", "decode")}
    clients = Clients(settled)
    controller = settled.controller_pid()
    kill(controller)
    settled.wait_until_settled(BACK_WITHIN_S, frozenset({controller}))
    assert clients.results() == undisturbed
    assert {role: ranks_of(settled, role) for role in before} == before


def test_a_group_drains_as_a_whole_and_streams_go_on(settled: Cluster, undisturbed: dict[str, str]) -> None:
    before = ranks_of(settled, "decode")
    clients = Clients(settled)
    clients.wait_until_all_have(2)
    settled.baton("drain", "decode/0", timeout_s=180)
    assert clients.results() == undisturbed
    after = ranks_of(settled, "decode")
    assert set(after) == set(before) and not set(after.values()) & set(before.values()), f"{before} -> {after}"

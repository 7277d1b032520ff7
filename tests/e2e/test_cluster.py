"""The life of a cluster: serving, scaling, deaths of its parts, down with nothing left. Ends of other kinds: test_cluster_ends.py."""

from __future__ import annotations

import contextlib
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from core.errors import Unavailable
from deploy.client import ControlClient
from deploy.folder import processes_of
from tests.support.cluster import ROOT, Cluster, kill, rank_processes_of
from tests.support.patience import overload

pytestmark = pytest.mark.e2e

BACK_WITHIN_S = 30


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    found = Cluster(tmp_path_factory.mktemp("a home with spaces and a path that is too long for the sockets of Ray"))
    try:
        print(found.up())
        yield found
    finally:
        found.down()


@pytest.fixture
def settled(cluster: Cluster) -> Cluster:
    cluster.wait_until_settled(BACK_WITHIN_S)
    return cluster


def collect(cluster: Cluster, prompt: str, max_tokens: int) -> str:
    """The text of its stream; a failure becomes the end of it."""
    parts: list[str] = []
    try:
        for text in cluster.complete(prompt, max_tokens):
            parts.append(text)
    except (AssertionError, OSError, ValueError) as error:
        parts.append(f"FAILED {error!r}")
    return "".join(parts)


def is_free(cluster: Cluster) -> bool:
    """Whether ranks have told the controller that nothing holds a page or a slot: what it knows is up to health_interval_s old."""
    pages = {"prefill": 64, "decode": 128}
    loads = {row.member.role: row.load for row in cluster.rows().values() if row.member.role in pages}
    return all(load.pages_free == pages[role] and load.slots_free == load.slots_total for role, load in loads.items())


def end_of(thread: threading.Thread) -> None:
    thread.join(120 * overload())
    assert not thread.is_alive(), "its stream does not end"


class Stream:
    """A stream in a thread of its own. If it fails, its error is the last text."""

    def __init__(self, cluster: Cluster, prompt: str, max_tokens: int) -> None:
        self._cluster, self._prompt, self._max_tokens = cluster, prompt, max_tokens
        self._texts: list[str] = []
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            for text in self._cluster.complete(self._prompt, self._max_tokens):
                self._texts.append(text)
        except (AssertionError, OSError, ValueError) as error:
            self._texts.append(f"FAILED {error!r}")

    def wait_for(self, num_texts: int) -> None:
        """Returns when so many have come."""
        self._cluster.wait(lambda: len(self._texts) >= num_texts or not self._thread.is_alive(), f"{num_texts} texts of a stream", 60)
        assert len(self._texts) >= num_texts, self._texts

    def text(self) -> str:
        """The whole."""
        end_of(self._thread)
        return "".join(self._texts)


def test_the_printed_curl_line_works(settled: Cluster) -> None:
    output = settled.up()
    assert "is running already" in output
    line = next(line.strip() for line in output.splitlines() if line.strip().startswith("curl "))
    command = shlex.split(line)
    if shutil.which("curl") is None:
        pytest.skip("no curl on this machine")
    result = subprocess.run([*command, "-s", "-m", "60", "-w", "\n%{http_code}"], capture_output=True, text=True, check=True)
    assert result.stdout.endswith("\n200") and '"role":"assistant"' in result.stdout


def test_nothing_listens_beyond_loopback(settled: Cluster) -> None:
    found = {f"socket:[{inode}]" for inode in _listening_beyond_loopback()}
    for pid in processes_of(settled.state.marker):
        held = set()
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # the process has just ended
            for link in pathlib.Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(FileNotFoundError):  # or has just closed one
                    held.add(os.readlink(link))
            assert not held & found, pathlib.Path(f"/proc/{pid}/cmdline").read_text()


def _listening_beyond_loopback() -> set[str]:
    """Inodes of TCP sockets in state LISTEN on another address than loopback."""
    loopback = ("0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000")
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in pathlib.Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[1].partition(":")[0] not in loopback:
                found.add(fields[9])
    return found


def test_another_specification_is_refused_by_up_and_shown_by_apply(settled: Cluster) -> None:
    output = settled.baton("up", str(settled.file), "prefill.chunk_tokens=64", expect=1)
    assert "prefill.chunk_tokens: 256 -> 64" in output and "baton apply" in output
    output = settled.baton("apply", str(settled.file), "prefill.chunk_tokens=64", "--dry-run")
    assert output == "baton: prefill.chunk_tokens: 256 -> 64\n"
    assert settled.baton("apply", str(settled.file)) == "baton: nothing changes\n"
    output = settled.baton("apply", str(settled.file), "router.control_address=127.0.0.1:1", expect=1)
    assert "router.control_address cannot change while the cluster runs" in output


def test_a_stranger_gets_nothing_from_the_controller(settled: Cluster) -> None:
    with ControlClient(settled.state.control_address, "a guess") as stranger:
        for ask in (
            stranger.status,
            lambda: stranger.apply(replicas={"prefill": 0}),
            lambda: stranger.drain("decode/0"),
            stranger.shut_down,
        ):
            with pytest.raises(Unavailable, match="does not take its token"):
                ask()
    assert settled.status().desired_replicas["prefill"] == 1


def test_ranks_and_routers_have_the_priority_of_whoever_started_them(settled: Cluster) -> None:
    for name, row in settled.rows().items():
        assert os.getpriority(os.PRIO_PROCESS, row.pid) == os.getpriority(os.PRIO_PROCESS, 0), name


def test_status_shows_every_member_and_what_pages_travel_over(settled: Cluster) -> None:
    assert collect(settled, "Hello", 2)
    settled.wait(lambda: any(row.note for row in settled.rows().values()), "a rank has said what pages travel over")
    settled.wait(lambda: is_free(settled), "ranks have told that all pages and slots are free")
    output = settled.baton("status")
    ranks = settled.only("prefill")[0], settled.only("decode")[0]
    for word in ("1 link over shared_memory", "router/0.0", *ranks, "64/64", "128/128", "settled"):
        assert word in output, f"{word!r} is missing:\n{output}"
    for words, member in (("rank.ready member=prefill/", ["prefill"]), ("controller: ", [])):
        output = settled.baton("logs", *member)
        assert words in output, f"{words!r} is missing:\n{output}"


def test_apply_restarts_what_the_change_concerns(settled: Cluster) -> None:
    before = {name: row.pid for name, row in settled.rows().items()}
    settled.baton("apply", str(settled.file), "prefill.chunk_tokens=64")
    after = {name: row.pid for name, row in settled.rows().items()}
    changed = [name.partition("/")[0] for name in before if before[name] != after[name]]
    assert changed == ["prefill"], f"{before} -> {after}\n{settled.logs()}"
    settled.baton("apply", str(settled.file))


NUM_CLIENTS = 16
SCALED_TOKENS = 24


def test_scaling_under_load_fails_no_request_changes_no_token_and_leaves_nothing(settled: Cluster) -> None:
    prompts = [f"Request {i}: once upon a time" for i in range(NUM_CLIENTS)]
    streams = {prompt: Stream(settled, prompt, SCALED_TOKENS) for prompt in prompts}
    expected = {prompt: stream.text() for prompt, stream in streams.items()}
    assert "FAILED" not in "".join(expected.values()) and all(expected.values()), expected

    is_over = threading.Event()
    wrong: list[str] = []
    num_done = [0] * NUM_CLIENTS

    def client(number: int) -> None:
        while not is_over.is_set() and not wrong:
            text = collect(settled, prompts[number], SCALED_TOKENS)
            if text != expected[prompts[number]]:
                wrong.append(f"client {number}: {text!r} instead of {expected[prompts[number]]!r}")
            num_done[number] += 1

    clients = [threading.Thread(target=client, args=(number,)) for number in range(NUM_CLIENTS)]
    for thread in clients:
        thread.start()
    try:
        settled.baton("scale", "prefill=2", "decode=2")
        assert sorted(name.partition("/")[0] for name in settled.rows()) == ["decode", "decode", "prefill", "prefill", "router"]
        settled.baton("scale", "prefill=1")
        settled.baton("scale", "decode=1")
    finally:
        is_over.set()
        for thread in clients:
            end_of(thread)
    print(f"{sum(num_done)} requests while scaling")
    assert wrong == [] and min(num_done) >= 1, f"{wrong} {num_done}"

    rows = settled.rows()
    assert len(rows) == 3, rows
    settled.wait(lambda: is_free(settled), "all pages and slots are free")
    pids = sorted(row.pid for row in rows.values())
    settled.wait(lambda: sorted(rank_processes_of(settled.state.marker)) == pids, f"no rank or router has a process but {pids}")


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_killed_rank_comes_back_and_streams_go_on(settled: Cluster, role: str) -> None:
    prompt = "The story of a river and"
    expected = "".join(settled.complete(prompt, 120))
    stream = Stream(settled, prompt, 120)
    stream.wait_for(5)
    name, pid = settled.only(role)
    kill(pid)
    print(f"{name} back after {settled.wait_until_settled(BACK_WITHIN_S, frozenset({pid})):.1f} s")
    assert stream.text() == expected
    assert settled.rows()[f"{name}.0"].restarts >= 1


def test_a_killed_router_comes_back(settled: Cluster) -> None:
    pid = settled.rows()["router/0.0"].pid
    kill(pid)
    print(f"router back after {settled.wait_until_settled(BACK_WITHIN_S, frozenset({pid})):.1f} s")
    assert "".join(settled.complete("Hello", 5))


def test_a_killed_controller_comes_back_and_adopts_what_runs(settled: Cluster) -> None:
    settled.baton("scale", "decode=2")
    before = {name: row.pid for name, row in settled.rows().items()}
    prompt = "A long way from home"
    expected = "".join(settled.complete(prompt, 120))
    stream = Stream(settled, prompt, 120)
    controller = settled.controller_pid()
    kill(controller)
    print(f"controller back after {settled.wait_until_settled(BACK_WITHIN_S, frozenset({controller})):.1f} s")
    assert stream.text() == expected
    after = {name: row.pid for name, row in settled.rows().items()}
    assert after == before, f"nothing is restarted, and the scaling is remembered\n{settled.logs()}"
    settled.baton("scale", "decode=1")


def test_controller_and_rank_killed_together_come_back(settled: Cluster) -> None:
    victims = [settled.only("decode")[1], settled.controller_pid()]
    for pid in victims:
        kill(pid)
    print(f"both back after {settled.wait_until_settled(BACK_WITHIN_S, frozenset(victims)):.1f} s")
    rows = settled.rows()
    assert len(rows) == 3, rows
    assert "".join(settled.complete("Hello", 5))


def test_a_frozen_rank_is_replaced(settled: Cluster) -> None:
    _, pid = settled.only("prefill")
    settled.baton("apply", str(settled.file), "placement.health_timeout_s=6")
    try:
        os.kill(pid, signal.SIGSTOP)
        print(f"prefill back after {settled.wait_until_settled(BACK_WITHIN_S, frozenset({pid})):.1f} s")
    finally:
        settled.baton("apply", str(settled.file))
    settled.wait(lambda: not pathlib.Path(f"/proc/{pid}").exists(), f"process {pid} has ended")


def test_what_cannot_be_placed_is_reported_and_blocks_nobody(settled: Cluster) -> None:
    room = int((os.cpu_count() or 1) / 0.2)
    output = settled.baton("scale", f"decode={room + 2}", "--no-wait")
    assert f"decode.replicas: 1 -> {room + 2}" in output, output
    output = settled.baton("scale", "decode=1")
    assert "done" in output, output
    there, _ = settled.only("prefill")
    try:
        changes = ["prefill.replicas=2", "placement.node_labels={rack: r9}", "placement.placement_timeout_s=5"]
        output = settled.baton("apply", str(settled.file), *changes, expect=1)
        assert "none of 1 nodes has the labels rack=r9" in output, output
        states = {name: row.member.state for name, row in settled.rows().items() if row.member.role == "prefill"}
        assert states.pop(f"{there}.0") == "ready" and list(states.values()) == ["given up"], settled.logs()
        assert "".join(settled.complete("Hello", 5))
    finally:
        settled.baton("apply", str(settled.file))


def test_drain_restarts_a_replica_after_its_requests(settled: Cluster) -> None:
    name, pid = settled.only("decode")
    prompt = "Where the road ends"
    stream = Stream(settled, prompt, 80)
    stream.wait_for(1)
    settled.baton("drain", name)
    text = stream.text()
    assert "FAILED" not in text and settled.only("decode")[1] != pid, text
    output = settled.baton("drain", "decode/7", expect=1)
    assert f"'decode/7' is no ready replica; those are {name}, " in output, output


def test_scaling_to_zero_leaves_a_router_that_answers(settled: Cluster) -> None:
    settled.baton("scale", "prefill=0", "decode=0")
    settled.wait(lambda: settled.get("/ready")["status"] == 503, "the router has heard that no rank is there")
    assert settled.get("/health")["status"] == 200
    settled.baton("scale", "prefill=1", "decode=1")
    assert "".join(settled.complete("Hello", 5))


def test_python_m_deploy_and_baton_are_one_command() -> None:
    result = subprocess.run([sys.executable, "-m", "deploy", "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.startswith("usage: baton ")

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
import time
from collections.abc import Iterator

import pytest

from core.errors import Unavailable
from deploy.client import ControlClient
from deploy.folder import processes_of
from tests.support.cluster import ROOT, Cluster, kill, rank_processes_of

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


def stream_in_background(cluster: Cluster, prompts: list[str], max_tokens: int) -> tuple[list[threading.Thread], dict[str, list[str]]]:
    """Streams started at once; texts by prompt. A stream that fails leaves its error as the last text."""
    texts: dict[str, list[str]] = {prompt: [] for prompt in prompts}

    def run(prompt: str) -> None:
        try:
            for text in cluster.complete(prompt, max_tokens):
                texts[prompt].append(text)
        except (AssertionError, OSError, ValueError) as error:
            texts[prompt].append(f"FAILED {error!r}")

    threads = [threading.Thread(target=run, args=(prompt,)) for prompt in prompts]
    for thread in threads:
        thread.start()
    return threads, texts


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
        with contextlib.suppress(FileNotFoundError):  # the process has just ended
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
    for word in ("1 over shared_memory", "router/0.0", *ranks, "64/64", "128/128", "settled"):
        assert word in output, f"{word!r} is missing:\n{output}"
    assert "rank.ready member=prefill/" in settled.baton("logs", "prefill")
    assert "controller: " in settled.baton("logs")


def test_apply_restarts_what_the_change_concerns(settled: Cluster) -> None:
    before = {name: row.pid for name, row in settled.rows().items()}
    settled.baton("apply", str(settled.file), "prefill.chunk_tokens=64")
    after = {name: row.pid for name, row in settled.rows().items()}
    assert [name.partition("/")[0] for name in before if before[name] != after[name]] == ["prefill"]
    settled.baton("apply", str(settled.file))


NUM_CLIENTS = 16
SCALED_TOKENS = 24


def test_scaling_under_load_fails_no_request_changes_no_token_and_leaves_nothing(settled: Cluster) -> None:
    prompts = [f"Request {i}: once upon a time" for i in range(NUM_CLIENTS)]
    threads, texts = stream_in_background(settled, prompts, SCALED_TOKENS)
    for thread in threads:
        thread.join(120)
    expected = {prompt: "".join(parts) for prompt, parts in texts.items()}
    assert "FAILED" not in "".join(expected.values()) and all(expected.values())

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
            thread.join(120)
    print(f"{sum(num_done)} requests while scaling")
    assert wrong == [] and min(num_done) >= 1

    rows = settled.rows()
    assert len(rows) == 3
    settled.wait(lambda: is_free(settled), "all pages and slots are free")
    assert sorted(rank_processes_of(settled.state.marker)) == sorted(row.pid for row in rows.values())


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_killed_rank_comes_back_and_streams_go_on(settled: Cluster, role: str) -> None:
    prompt = "The story of a river and"
    expected = "".join(settled.complete(prompt, 120))
    threads, texts = stream_in_background(settled, [prompt], 120)
    while len(texts[prompt]) < 5:
        time.sleep(0.01)
    name, pid = settled.only(role)
    kill(pid)
    print(f"{name} back after {settled.wait_until_settled(BACK_WITHIN_S, frozenset({pid})):.1f} s")
    threads[0].join(120)
    assert "".join(texts[prompt]) == expected
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
    threads, texts = stream_in_background(settled, [prompt], 120)
    controller = settled.controller_pid()
    kill(controller)
    print(f"controller back after {settled.wait_until_settled(BACK_WITHIN_S, frozenset({controller})):.1f} s")
    threads[0].join(120)
    assert "".join(texts[prompt]) == expected
    assert {name: row.pid for name, row in settled.rows().items()} == before  # nothing was restarted, the scaling is remembered
    settled.baton("scale", "decode=1")


def test_controller_and_rank_killed_together_come_back(settled: Cluster) -> None:
    victims = [settled.only("decode")[1], settled.controller_pid()]
    for pid in victims:
        kill(pid)
    print(f"both back after {settled.wait_until_settled(BACK_WITHIN_S, frozenset(victims)):.1f} s")
    assert len(settled.rows()) == 3 and "".join(settled.complete("Hello", 5))


def test_a_frozen_rank_is_replaced(settled: Cluster) -> None:
    _, pid = settled.only("prefill")
    os.kill(pid, signal.SIGSTOP)
    print(f"prefill back after {settled.wait_until_settled(BACK_WITHIN_S, frozenset({pid})):.1f} s")
    assert not pathlib.Path(f"/proc/{pid}").exists()


def test_what_cannot_be_placed_is_reported_and_blocks_nobody(settled: Cluster) -> None:
    room = int((os.cpu_count() or 1) / 0.2)
    output = settled.baton("scale", f"decode={room + 2}", "--no-wait")
    assert f"decode.replicas: 1 -> {room + 2}" in output
    output = settled.baton("scale", "decode=1")
    assert "done" in output
    there, _ = settled.only("prefill")
    try:
        output = settled.baton("apply", str(settled.file), "prefill.replicas=2", "placement.node_labels={rack: r9}", expect=1)
        assert "none of 1 nodes has the labels rack=r9" in output
        states = {name: row.member.state for name, row in settled.rows().items() if row.member.role == "prefill"}
        assert states.pop(f"{there}.0") == "ready" and list(states.values()) == ["given up"]
        assert "".join(settled.complete("Hello", 5))
    finally:
        settled.baton("apply", str(settled.file))


def test_drain_restarts_a_replica_after_its_requests(settled: Cluster) -> None:
    name, pid = settled.only("decode")
    prompt = "Where the road ends"
    threads, texts = stream_in_background(settled, [prompt], 80)
    while not texts[prompt]:
        time.sleep(0.01)
    settled.baton("drain", name)
    threads[0].join(60)
    assert "FAILED" not in "".join(texts[prompt]) and settled.only("decode")[1] != pid
    assert f"'decode/7' is no ready replica; those are {name}, " in settled.baton("drain", "decode/7", expect=1)


def test_scaling_to_zero_leaves_a_router_that_answers(settled: Cluster) -> None:
    settled.baton("scale", "prefill=0", "decode=0")
    assert settled.get("/health")["status"] == 200 and settled.get("/ready")["status"] == 503
    settled.baton("scale", "prefill=1", "decode=1")
    assert "".join(settled.complete("Hello", 5))


def test_python_m_deploy_and_baton_are_one_command() -> None:
    result = subprocess.run([sys.executable, "-m", "deploy", "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.startswith("usage: baton ")

"""One cluster over three hosts with addresses of their own: Ray nodes, gRPC and NIXL over TCP between them, and a link that is cut in
the midst of transfers and healed."""

from __future__ import annotations

import concurrent.futures
import json
import os
import pathlib
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from deploy.folder import ClusterFolder
from protos import control_pb2
from tests.support import hosts
from tests.support.cluster import ANSWER_S, MODEL, ROOT
from tests.support.patience import overload

pytestmark = [pytest.mark.e2e, pytest.mark.skipif(hosts.missing() is not None, reason=hosts.missing() or "")]

NAME, ROUTER, CONTROL, RAY = "hosts", 8000, 8010, 6379
NODE_TRIES, NODE_TIMEOUT_S = 3, 90
CUT_S = 6.0
"""Longer than transfer.liveness_timeout_s, shorter than what makes Ray give up a node."""
HEALTH_TIMEOUT_S = 20.0
"""TCP tries a link again after up to as long as it was cut, and longer where packets had to queue before."""


class ThreeHosts:
    """One prefill and two decode ranks, one rank a host; router and controller on host 0."""

    def __init__(self, home: pathlib.Path) -> None:
        self.home, self.net = home, hosts.Hosts(3)
        self.folder, self._processes = ClusterFolder(home, NAME), list[subprocess.Popen[bytes]]()
        self._temp = pathlib.Path(tempfile.mkdtemp(prefix="bt", dir="/tmp"))  # short: Ray puts unix sockets inside
        # A head also starts Ray's client server, by a shell line that does not survive a space in the path of Python.
        (self._temp / "venv").symlink_to(sys.prefix)
        self._ray_command = [str(self._temp / "venv/bin/python"), "-m", "ray.scripts.scripts"]
        token = home / "token"
        token.write_text(secrets.token_hex(32))
        self._env = os.environ | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",
            "PYTHONPATH": str(ROOT),
        }
        head = self.net.address(0)
        (home / "hosts.yaml").write_text(
            f"name: {NAME}\n"
            f'model: {{path: "{MODEL}", served_name: tiny}}\n'
            "engine: {device: cpu, max_model_len: 4096}\n"
            "prefill: {replicas: 1, num_pages: 64}\n"
            "decode: {replicas: 2, num_pages: 64}\n"
            f"router: {{host: {head}, port: {ROUTER}, control_address: '{head}:{CONTROL}', default_thinking: false}}\n"
            "transfer: {ucx_tls: tcp}\n"
            f"placement: {{ray: '{head}:{RAY}', cpus_per_rank: 1, health_timeout_s: {HEALTH_TIMEOUT_S:g}}}\n"
        )

    def start(self) -> None:
        self._ray(0, "--head", f"--port={RAY}", "--include-dashboard=false", f"--temp-dir={self._temp}")
        for host in (1, 2):
            self._ray(host, f"--address={self.net.address(0)}:{RAY}")
        self.baton("up", str(self.home / "hosts.yaml"))

    def _ray(self, host: int, *arguments: str) -> None:
        """Returns when the node has joined. Ray gives a node 30 s for that, which a busy machine may exceed: then it is tried again."""
        common = ["--num-cpus=1", "--object-store-memory=80000000", "--disable-usage-stats", "--block"]
        command = self.net.command(host, [*self._ray_command, "start", f"--node-ip-address={self.net.address(host)}", *common, *arguments])
        path = self.home / f"ray{host}.log"
        for _ in range(NODE_TRIES):
            with path.open("wb") as log:
                process = subprocess.Popen(command, env=self._env, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
            self._processes.append(process)
            end = time.monotonic() + NODE_TIMEOUT_S * overload()
            while process.poll() is None and time.monotonic() < end:
                if b"will now block" in path.read_bytes():
                    return
                time.sleep(0.1)
            _end(process)  # the next one needs its ports
        raise AssertionError(f"host {host} did not join Ray:\n{self.logs()}")

    def baton(self, *arguments: str) -> str:
        command = self.net.command(0, [sys.executable, "-m", "deploy", "--home", str(self.home), *arguments])
        timeout_s = 240 * overload()
        done = subprocess.run(command, cwd=ROOT, env=self._env, capture_output=True, text=True, timeout=timeout_s, stdin=subprocess.DEVNULL)
        output = done.stdout + done.stderr
        assert done.returncode == 0, f"baton {' '.join(arguments)}:\n{output}\n{self.logs()}"
        return output

    def status(self) -> Any:
        """Asked by a process on the host: gRPC connects from threads of its own, which may be of the hosts' outside."""
        ask = "ControlClient(*sys.argv[1:]).status().SerializeToString()"
        code = f"import sys; from deploy.client import ControlClient; sys.stdout.buffer.write({ask})"
        command = [sys.executable, "-c", code, f"{self.net.address(0)}:{CONTROL}", self.folder.read_control_token()]
        end = time.monotonic() + ANSWER_S * overload()
        while True:
            asked = subprocess.run(
                self.net.command(0, command), cwd=ROOT, env=self._env, capture_output=True, timeout=60 * overload(), check=False
            )
            if asked.returncode == 0:
                return control_pb2.ClusterStatus.FromString(asked.stdout)
            assert time.monotonic() < end, f"{asked.stderr.decode()}\n{self.logs()}"

    def host_of(self, rank: Any) -> int:
        address = rank.member.address.rpartition(":")[0]
        return [self.net.address(host) for host in range(3)].index(address)

    def complete(self, prompt: str, max_tokens: int, seed: int) -> str:
        body = {"model": "tiny", "prompt": prompt, "max_tokens": max_tokens, "seed": seed, "temperature": 1.0, "ignore_eos": True}
        url = f"http://{self.net.address(0)}:{ROUTER}/v1/completions"

        def ask() -> str:
            request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
            try:
                with urllib.request.urlopen(request, timeout=120 * overload()) as response:
                    return str(json.load(response)["choices"][0]["text"])
            except urllib.error.HTTPError as error:
                raise AssertionError(f"{error.code}: {error.read().decode(errors='replace')}\n{self.logs()}") from error

        return self.net.call(0, ask)

    def wait(self, is_so: Any, timeout_s: float, what: str) -> None:
        began = time.monotonic()
        while not is_so():
            assert time.monotonic() < began + timeout_s * overload(), f"{what}: not within {timeout_s} s\n{self.logs()}"
            time.sleep(0.1)

    def logs(self) -> str:
        paths = [*sorted(self.folder.logs.glob("*.log")), *sorted(self.home.glob("ray*.log"))]
        return "\n".join(f"--- {path.name}\n" + "\n".join(path.read_text(errors="replace").splitlines()[-12:]) for path in paths)

    def close(self) -> None:
        try:
            if self.folder.read() is not None:
                for host in range(3):
                    self.net.heal(host)
                self.baton("down", "--name", NAME)
        finally:
            for process in reversed(self._processes):
                process.terminate()
            for process in self._processes:
                _end(process)
            self.net.close()
            shutil.rmtree(self._temp, ignore_errors=True)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ThreeHosts]:
    three = ThreeHosts(tmp_path_factory.mktemp("hosts"))
    try:
        three.start()
        yield three
    finally:
        three.close()


def prompt(number: int, words: int) -> str:
    return " ".join(f"The code of the red fox of Anna is {(number * 7919 + i * 31) % 9000 + 1000}." for i in range(words // 10))


def test_ranks_on_three_hosts_serve_together(three: ThreeHosts) -> None:
    ranks = three.status().ranks
    assert sorted(map(three.host_of, ranks)) == [0, 1, 2], ranks
    texts = [three.complete(prompt(n, 60), 12, n) for n in range(4)]
    assert texts == [three.complete(prompt(n, 60), 12, n) for n in range(4)] and len(set(texts)) > 1
    sender = "".join(path.read_text(errors="replace") for path in three.folder.logs.glob("prefill-*.log"))
    assert "path=tcp lanes=tcp/" in sender, f"the pages crossed the links\n{sender}"
    assert "transfer.slow_path" in sender and "expected=shared_memory" in sender, f"it is one machine, and the ranks can tell\n{sender}"


def test_a_link_is_cut_in_the_midst_of_transfers_and_healed(three: ThreeHosts) -> None:
    """Each request ends with the tokens of an undisturbed run; the rank behind the link serves again, and no page is lost."""
    cases = [(prompt(n, 1200), 24, 100 + n) for n in range(4)]
    undisturbed = [three.complete(*case) for case in cases]
    status = three.status()
    victim = next(rank for rank in status.ranks if rank.member.role == "decode" and three.host_of(rank) != 0)
    host = three.host_of(victim)
    before = {rank.member.incarnation for rank in status.ranks}
    three.net.limit(host, "2mbit")  # a hand-off of these prompts takes seconds
    with concurrent.futures.ThreadPoolExecutor(len(cases)) as clients:
        pending = [clients.submit(three.complete, *case) for case in cases]
        three.wait(lambda: _reserved(three, victim) > 0, 30, "a reservation on the rank behind the link")
        time.sleep(1.0)  # chunks are being computed, and their pages pushed
        three.net.cut(host)
        time.sleep(CUT_S)
        three.net.unlimit(host)
        three.net.heal(host)
        found = [one.result(150 * overload()) for one in pending]
    assert found == undisturbed
    sender = "".join(path.read_text(errors="replace") for path in three.folder.logs.glob("prefill-*.log"))
    assert "transfer.peer_lost" in sender, f"the cut met no transfer\n{sender}"
    three.wait(lambda: three.status().settled, 60, "the cluster as wanted")
    three.wait(lambda: all(_is_empty(rank) for rank in three.status().ranks), 60, "all pages free")
    after = {rank.member.incarnation for rank in three.status().ranks}
    assert after == before, f"a rank was restarted for a cut that healed\n{three.logs()}"

    def serves() -> bool:
        with concurrent.futures.ThreadPoolExecutor(4) as clients:
            list(clients.map(lambda n: three.complete(prompt(n, 60), 8, n), range(4)))
        after = next(rank for rank in three.status().ranks if rank.member.incarnation == victim.member.incarnation)
        return bool(after.load.tokens_total > victim.load.tokens_total)

    three.wait(serves, 60, "tokens from the rank behind the healed link")


def _reserved(three: ThreeHosts, victim: Any) -> int:
    rank = next(rank for rank in three.status().ranks if rank.member.incarnation == victim.member.incarnation)
    return int(victim.load.pages_free) - int(rank.load.pages_free)


def _is_empty(rank: Any) -> bool:
    return bool(rank.load.pages_free == 64)

"""A real cluster for tests: the `baton` command as a user runs it, in a home of its own, on free ports."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

from core.errors import Unavailable
from deploy.client import ControlClient
from deploy.folder import ClusterFolder, ClusterState, processes_of
from tests.support.patience import overload
from tests.support.ports import free_ports
from tests.support.shared_memory import left_over

ROOT = pathlib.Path(__file__).resolve().parents[2]
MODEL = ROOT / "deploy/demo_model/checkpoint"

HEALTH_TIMEOUT_S = 60.0
"""A rank that is late on a busy machine is not to be restarted under a test that looks at processes. Tests of frozen ones set less."""

ANSWER_S = 20.0
"""How long the controller, or one that is started in its place, is asked until it answers."""


class Cluster:
    """`up` starts it; `down` must be called whatever happens in between."""

    prefix: tuple[str, ...] = ()
    """Of the command that starts it: a program that runs another."""

    def __init__(self, home: pathlib.Path, name: str = "test", model: pathlib.Path = MODEL) -> None:
        home.mkdir(parents=True, exist_ok=True)
        self.home, self.name = home, name
        self.file = home / f"{name}.yaml"
        self.port, self.control_port = free_ports(2)
        self.file.write_text(
            f"name: {name}\n"
            f'model: {{path: "{model}", served_name: tiny}}\n'
            "engine: {device: cpu, max_model_len: 4096}\n"
            "prefill: {num_pages: 64}\n"
            "decode: {num_pages: 128}\n"
            f"router: {{port: {self.port}, control_address: '127.0.0.1:{self.control_port}', default_thinking: false, "
            "wait_for_members_s: 120}\n"
            f"placement: {{cpus_per_rank: 0.2, restart_backoff_s: 0.5, health_timeout_s: {HEALTH_TIMEOUT_S:g}}}\n"
        )
        self.folder = ClusterFolder(home, name)
        self.shared_memory_before = left_over()

    def baton(self, *arguments: str, expect: int = 0, timeout_s: float = 120) -> str:
        """Run the command; its standard output and error. Fails unless it exits with `expect`, within
        `timeout_s` stretched by what else this machine computes."""
        command = [*self.prefix, sys.executable, "-m", "deploy", "--home", str(self.home), *arguments]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s * overload(), stdin=subprocess.DEVNULL)
        output = result.stdout + result.stderr
        assert result.returncode == expect, f"baton {' '.join(arguments)} exited with {result.returncode}:\n{output}\n{self.logs()}"
        return output

    def up(self, *overrides: str) -> str:
        return self.baton("up", str(self.file), *overrides, timeout_s=300)

    @property
    def state(self) -> ClusterState:
        state = self.folder.read()
        assert state is not None, "the cluster is not running"
        return state

    def status(self) -> Any:
        """A control_pb2.ClusterStatus. Raises Unavailable if none comes within ANSWER_S, stretched by what else this machine computes."""
        end = time.monotonic() + ANSWER_S * overload()
        with ControlClient(self.state.control_address, self.folder.read_control_token()) as client:
            while True:
                try:
                    return client.status()
                except Unavailable:
                    if time.monotonic() > end:
                        raise
                time.sleep(0.1)

    def rows(self) -> dict[str, Any]:
        """ "prefill/0.0" -> control_pb2.RankStatus."""
        status = self.status()
        return {f"{r.member.role}/{r.member.replica}.{r.member.rank}": r for r in (*status.routers, *status.ranks)}

    def only(self, role: str) -> tuple[str, int]:
        """Replica name and pid of the only rank of this role. Its index is 0 or, after scaling, whatever was left."""
        ((name, row),) = [(name, row) for name, row in self.rows().items() if row.member.role == role]
        return name.partition(".")[0], int(row.pid)

    def controller_pid(self) -> int:
        for pid in processes_of(self.state.marker):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
                if b"ray::Controller" in pathlib.Path(f"/proc/{pid}/cmdline").read_bytes():
                    return pid
        raise ProcessLookupError("the controller has no process")

    def wait_until_settled(self, timeout_s: float, without: frozenset[int] = frozenset()) -> float:
        """Seconds until everything is as wanted, on none of the processes `without`, and the router is ready. Fails after `timeout_s`,
        stretched by what else this machine computes."""
        began = time.monotonic()
        last = ""
        while time.monotonic() < began + timeout_s * overload():
            try:
                status = self.status()
                pids = {row.pid for row in (*status.routers, *status.ranks)} | {self.controller_pid()}
                if status.settled and not pids & without and self.get("/ready")["status"] == 200:
                    return time.monotonic() - began
                last = f"settled={status.settled} {pids=}"
            except (OSError, http.client.HTTPException, Unavailable) as error:  # the controller or the router is being restarted
                last = repr(error)
            time.sleep(0.1)
        raise AssertionError(f"not as wanted after {timeout_s} s ({last})\n{self.logs()}")

    def wait(self, claim: Callable[[], bool], what: str, timeout_s: float = 10.0) -> None:
        """Fail unless the claim comes true in time: what the controller tells of ranks is up to health_interval_s old."""
        began = time.monotonic()
        while not claim():
            assert time.monotonic() < began + timeout_s * overload(), f"not true after {timeout_s:g} s: {what}\n{self.logs()}"
            time.sleep(0.05)

    def get(self, path: str) -> dict[str, Any]:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=10) as response:
                return {"status": response.status, "body": response.read()}
        except urllib.error.HTTPError as error:
            return {"status": error.code, "body": error.read()}

    def complete(self, prompt: str, max_tokens: int, seed: int = 1, timeout_s: float = 120) -> Iterator[str]:
        """Texts of a streamed completion, as they come. Raises on any error in the stream."""
        body = {"model": "tiny", "prompt": prompt, "max_tokens": max_tokens, "seed": seed, "stream": True, "ignore_eos": True}
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/v1/completions", json.dumps(body).encode(), headers)
        is_done = False
        try:
            response = urllib.request.urlopen(request, timeout=timeout_s * overload())
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{error.code}: {error.read().decode(errors='replace')}") from error
        with response:
            for raw in response:
                line = raw.decode().strip()
                if line == "data: [DONE]":
                    is_done = True
                elif line.startswith("data: "):
                    event = json.loads(line[6:])
                    assert "error" not in event, event
                    for choice in event["choices"]:
                        yield choice["text"]
        assert is_done, "the stream ended without [DONE]"

    def logs(self) -> str:
        """The end of every log file, for failures."""
        parts = []
        for path in sorted(self.folder.logs.glob("*.log")):
            parts.append(f"--- {path.name}\n" + "\n".join(path.read_text(errors="replace").splitlines()[-15:]))
        return "\n".join(parts)

    def down(self) -> None:
        """Take it down if it is up, and check that nothing is left behind."""
        state = self.folder.read()
        if state is not None:
            self.baton("down", "--name", self.name)
            assert processes_of(state.marker) == []
            assert not pathlib.Path(state.ray_dir).exists(), sorted(pathlib.Path(state.ray_dir).rglob("*"))
        names = {path.name for path in self.folder.path.iterdir()} if self.folder.path.exists() else set()
        assert names <= {"logs", "lock"}, names
        left = left_over(self.shared_memory_before, patience_s=5 * overload())
        assert not left, f"in /dev/shm, and nobody has it: {sorted(left)}"


def rank_processes_of(marker: str) -> list[int]:
    """Pids of the rank and router processes of the cluster with this marker."""
    found = []
    for pid in processes_of(marker):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
            if b"RankActor" in pathlib.Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
    return found


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)

"""`python -m` of the three roles, as processes on loopback with the demo model; no controller, no Ray."""

from __future__ import annotations

import pathlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import httpx
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
FILE = "deploy/clusters/local_cpu.yaml"
SMALL = ("engine.max_model_len=1024", "prefill.num_pages=8", "decode.num_pages=16")


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


class Parts:
    """Processes by name; their output in files of `logs`."""

    def __init__(self, logs: pathlib.Path) -> None:
        self.logs = logs
        self.running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, *arguments: str) -> None:
        with (self.logs / f"{name}.log").open("ab") as log:
            command = [sys.executable, "-m", name, FILE, *SMALL, *arguments]
            self.running[name] = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)

    def end(self, name: str, number: signal.Signals = signal.SIGTERM) -> int:
        process = self.running.pop(name)
        process.send_signal(number)
        return process.wait(30)

    def log(self) -> str:
        return "\n".join(path.read_text() for path in sorted(self.logs.iterdir()))


@pytest.fixture
def parts(tmp_path: pathlib.Path) -> Iterator[Parts]:
    found = Parts(tmp_path)
    try:
        yield found
    finally:
        for name in list(found.running):
            found.end(name, signal.SIGKILL)


def complete(client: httpx.Client, parts: Parts, within_s: float = 90.0) -> str:
    """The text of a greedy completion, as soon as there is one."""
    end = time.monotonic() + within_s
    while True:
        try:
            body = {"model": "baton-demo", "prompt": "Once upon a time", "max_tokens": 8, "temperature": 0}
            answer = client.post("/v1/completions", json=body)
            if answer.status_code == 200:
                text: str = answer.json()["choices"][0]["text"]
                return text
            problem = answer.text
        except httpx.TransportError as error:
            problem = repr(error)
        assert time.monotonic() < end, f"{problem}\n{parts.log()}"
        time.sleep(0.2)


def test_three_processes_serve_without_a_cluster_and_a_restarted_rank_is_found_again(parts: Parts) -> None:
    prefill, decode, http = free_ports(3)
    parts.start("router", f"router.port={http}", "--prefill", f"127.0.0.1:{prefill}", "--decode", f"127.0.0.1:{decode}")
    parts.start("prefill_worker", "--port", str(prefill))
    parts.start("decode_worker", "--port", str(decode))
    with httpx.Client(base_url=f"http://127.0.0.1:{http}", trust_env=False, timeout=60) as client:
        text = complete(client, parts)
        assert len(text) > 4
        parts.end("decode_worker", signal.SIGKILL)
        parts.start("decode_worker", "--port", str(decode))
        assert complete(client, parts) == text
    assert [parts.end(name) for name in ("router", "prefill_worker", "decode_worker")] == [0, 0, 0], parts.log()
    assert "Traceback" not in parts.log()


@pytest.mark.parametrize("name", ["router", "prefill_worker", "decode_worker"])
def test_what_is_wrong_is_one_sentence(name: str, parts: Parts) -> None:
    places = ["--prefill", "127.0.0.1:1", "--decode", "127.0.0.1:1"] if name == "router" else []
    section = name.removesuffix("_worker")
    command = [sys.executable, "-m", name, FILE, f"{section}.prot=1", *places]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert f"unknown key 'prot' in {section}" in done.stderr and "Traceback" not in done.stderr

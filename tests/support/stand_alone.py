"""`python -m` of the three roles, as processes on loopback with the demo model; no controller, no Ray."""

from __future__ import annotations

import pathlib
import signal
import subprocess
import sys
import time

import httpx

from tests.support.patience import overload
from tests.support.ports import free_ports

ROOT = pathlib.Path(__file__).resolve().parents[2]
FILE = "deploy/clusters/local_cpu.yaml"
SMALL = ("engine.max_model_len=1024", "prefill.num_pages=8", "decode.num_pages=16")


class Parts:
    """Processes by name; their output in files of `logs`. `kill_all` must be called whatever happens."""

    def __init__(self, logs: pathlib.Path, output: str = "") -> None:
        """`output`: a file that takes the output of all, in place of those."""
        self.logs, self._output = logs, output
        self.running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, *arguments: str) -> None:
        with open(self._output or self.logs / f"{name}.log", "ab") as log:
            command = [sys.executable, "-m", name, FILE, *SMALL, *arguments]
            self.running[name] = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)

    def end(self, name: str, number: signal.Signals = signal.SIGTERM) -> int:
        process = self.running.pop(name)
        process.send_signal(number)
        return process.wait(30 * overload())

    def start_all(self) -> str:
        """A router, a prefill and a decode rank; the router's URL."""
        prefill, decode, http = free_ports(3)
        self.start("router", f"router.port={http}", "--prefill", f"127.0.0.1:{prefill}", "--decode", f"127.0.0.1:{decode}")
        self.start("prefill_worker", "--port", str(prefill))
        self.start("decode_worker", "--port", str(decode))
        return f"http://127.0.0.1:{http}"

    def kill_all(self) -> None:
        for name in list(self.running):
            self.end(name, signal.SIGKILL)

    def log(self) -> str:
        return "\n".join(path.read_text() for path in sorted(self.logs.iterdir()))


def complete(client: httpx.Client, parts: Parts, within_s: float = 90.0) -> str:
    """The text of a greedy completion, as soon as there is one."""
    began = time.monotonic()
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
        assert time.monotonic() < began + within_s * overload(), f"{problem}\n{parts.log()}"
        time.sleep(0.2)

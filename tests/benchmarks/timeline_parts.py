"""A prefill rank, a decode rank and a router as processes of this machine that log every step (`timeline.py`)."""

from __future__ import annotations

import argparse
import os
import pathlib
import platform
import re
import signal
import socket
import subprocess
import sys
import time

import httpx

from tests.benchmarks.timeline_story import Event, parse

START_S = 1200.0
"""The first start on a GPU compiles kernels."""

IDLE_S = 60.0


class Parts:
    """Use as a context: all processes end with it. Their logs are in `folder`."""

    def __init__(self, folder: pathlib.Path, model: pathlib.Path, tokenizer: pathlib.Path, arguments: argparse.Namespace) -> None:
        self._folder = folder
        devices = arguments.devices.split(",")
        assert len(devices) == 2, f"--devices names two, not {devices}"
        self._visible = {role: visible_gpu(device) for role, device in zip(("prefill", "decode"), devices, strict=True)}
        on_gpu = devices[0].startswith("cuda")
        self.devices = [_device_name(device) for device in devices]
        num_pages = -(-(arguments.tokens + arguments.output_len) // 256) * (arguments.repeats + arguments.warm_ups + 2)
        self._settings = [
            f"engine.device={'cuda' if on_gpu else 'cpu'}",
            f"engine.load={'dummy' if arguments.layers is not None else 'checkpoint'}",
            f"engine.max_model_len={arguments.tokens + 256}",
            f"prefill.chunk_tokens={arguments.chunk}",
            f"prefill.num_pages={2 * -(-arguments.tokens // 256)}",
            "prefill.num_slots=2",
            f"decode.num_pages={num_pages}",
            "decode.num_slots=4",
            "decode.max_running=2",
            f"transfer.num_threads={4 if on_gpu else 0}",
            f"transfer.poll_interval_ms={arguments.poll_interval_ms}",
        ]
        self._file = folder / "cluster.yaml"
        self._file.write_text(f"name: timeline\nmodel:\n  path: {model}\n  tokenizer: {tokenizer}\n  served_name: timeline\n")
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Parts:
        try:
            self._start("prefill", "prefill_worker")
            self._start("decode", "decode_worker")
            addresses = {role: self._wait_for(role, r"\.ready .*address=(\S+)") for role in ("prefill", "decode")}
            with socket.socket() as found:
                found.bind(("127.0.0.1", 0))
                port = found.getsockname()[1]
            self.url = f"http://127.0.0.1:{port}"
            self._start("router", "router", f"router.port={port}", *(f"--{role}={address}" for role, address in addresses.items()))
            self._wait_until_served()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes.values():
            process.send_signal(signal.SIGTERM)
        for process in self._processes.values():
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def log(self, name: str) -> str:
        return (self._folder / f"{name}.log").read_text()

    def events(self) -> list[Event]:
        """Of both ranks so far, in the order of their times."""
        lines = [line for role in ("prefill", "decode") for line in self.log(role).splitlines()]
        return sorted((event for event in map(parse, lines) if event is not None), key=lambda event: event.time)

    def path(self) -> str:
        """What the pages travelled over."""
        return next(event.fields["path"] for event in self.events() if event.name == "transfer.connected")

    def wait_until_idle(self) -> None:
        """Returns when both ranks are done with every request, and have said so in their logs."""
        give_up_at = time.monotonic() + IDLE_S
        while any(self.log(role).count(f"{role}.accepted") != self.log(role).count(f"{role}.done") for role in ("prefill", "decode")):
            assert time.monotonic() < give_up_at, "a request does not end"
            time.sleep(0.02)

    def _start(self, name: str, module: str, *arguments: str) -> None:
        environment = os.environ | {"BATON_LOG_LEVEL": "debug"}
        if self._visible.get(name):
            environment["CUDA_VISIBLE_DEVICES"] = self._visible[name]
        command = [sys.executable, "-m", module, str(self._file), *self._settings, *arguments]
        with (self._folder / f"{name}.log").open("wb") as log:
            self._processes[name] = subprocess.Popen(command, stdout=log, stderr=log, env=environment)

    def _check(self, name: str) -> None:
        status = self._processes[name].poll()
        assert status is None, f"{name} ended with status {status}:\n{self.log(name)[-2000:]}"

    def _wait_for(self, name: str, pattern: str) -> str:
        give_up_at = time.monotonic() + START_S
        while (found := re.search(pattern, self.log(name))) is None:
            self._check(name)
            assert time.monotonic() < give_up_at, f"{name} is not ready after {START_S:g} s:\n{self.log(name)[-2000:]}"
            time.sleep(0.1)
        return found[1]

    def _wait_until_served(self) -> None:
        give_up_at = time.monotonic() + START_S
        while True:
            self._check("router")
            try:
                if httpx.get(f"{self.url}/ready", trust_env=False).status_code == 200:
                    return
            except httpx.TransportError:
                pass  # it does not listen yet
            assert time.monotonic() < give_up_at, f"the router is not ready:\n{self.log('router')[-2000:]}"
            time.sleep(0.1)


def visible_gpu(device: str) -> str:
    """What CUDA_VISIBLE_DEVICES must be in a process that is to see this device alone, one of those that this process sees; "" of a CPU."""
    index = device.partition(":")[2]
    seen = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return seen.split(",")[int(index)] if index and seen else index


def _device_name(device: str) -> str:
    if device == "cpu":
        return f"cpu ({platform.machine()}, {os.cpu_count()} cores)"
    import torch

    return torch.cuda.get_device_name(device)

"""Pretend hosts: network namespaces with addresses of their own, joined by a bridge in one more. Nothing leaves them.

    h0 --+
    h1 --+-- bridge        each line is a link that can be cut, healed and slowed down
    h2 --+

Needs root, `ip` and `tc`. All share this machine's files and processes: UCX must be told to use TCP, or it takes a shortcut.
"""

from __future__ import annotations

import concurrent.futures
import ctypes
import os
import pathlib
import shutil
import subprocess
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")

CLONE_NEWNET = 0x40000000


def missing() -> str | None:
    """Why there can be no pretend hosts here; None if there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    absent = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if absent:
        return f"needs {' and '.join(absent)}"
    name = f"baton-probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if made.returncode:
        return f"this machine makes no network namespaces: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", name], check=True)
    return None


class Hosts:
    """`close` must be called whatever happens in between; it takes the namespaces away, not the processes in them."""

    def __init__(self, count: int) -> None:
        self._prefix, self._count = f"bt{os.getpid()}", count
        self._hub = f"{self._prefix}hub"
        self._ip("netns", "add", self._hub)
        self._in(self._hub, "ip", "link", "add", "bridge", "type", "bridge")
        self._in(self._hub, "ip", "link", "set", "bridge", "up")
        for host in range(count):
            name = self.name(host)
            self._ip("netns", "add", name)
            self._in(self._hub, "ip", "link", "add", f"v{host}", "type", "veth", "peer", "name", "eth0", "netns", name)
            self._in(self._hub, "ip", "link", "set", f"v{host}", "master", "bridge", "up")
            self._in(name, "ip", "address", "add", f"{self.address(host)}/24", "dev", "eth0")
            self._in(name, "ip", "link", "set", "eth0", "up")
            self._in(name, "ip", "link", "set", "lo", "up")
            # Without a default route programs that ask for "my address" find none. It leads to the bridge, and no farther.
            self._in(name, "ip", "route", "add", "default", "dev", "eth0")

    def name(self, host: int) -> str:
        return f"{self._prefix}h{host}"

    def address(self, host: int) -> str:
        return f"10.77.0.{host + 1}"

    def command(self, host: int, arguments: Sequence[str]) -> list[str]:
        """What to start so that it runs on the host."""
        return ["ip", "netns", "exec", self.name(host), *arguments]

    def cut(self, host: int) -> None:
        self._in(self._hub, "ip", "link", "set", f"v{host}", "down")

    def heal(self, host: int) -> None:
        self._in(self._hub, "ip", "link", "set", f"v{host}", "up")

    def limit(self, host: int, rate: str) -> None:
        """Slow down what goes to the host, e.g. to "20mbit"."""
        self._in(self._hub, "tc", "qdisc", "replace", "dev", f"v{host}", "root", "tbf", "rate", rate, "burst", "64kb", "latency", "400ms")

    def unlimit(self, host: int) -> None:
        self._in(self._hub, "tc", "qdisc", "del", "dev", f"v{host}", "root")

    def call(self, host: int, function: Callable[[], T]) -> T:
        """Run a function here, in a thread whose sockets are the host's. Not one that leaves its sockets to threads of a library, as gRPC
        does: those of a process that has used it before are not the host's."""

        def inside() -> T:
            fd = os.open(f"/run/netns/{self.name(host)}", os.O_RDONLY)
            try:
                if ctypes.CDLL(None, use_errno=True).setns(fd, CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), f"cannot enter {self.name(host)}")
            finally:
                os.close(fd)
            return function()

        with concurrent.futures.ThreadPoolExecutor(1) as threads:
            return threads.submit(inside).result()

    def close(self) -> None:
        for name in (*map(self.name, range(self._count)), self._hub):
            if pathlib.Path(f"/run/netns/{name}").exists():
                self._ip("netns", "del", name)

    def _ip(self, *arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, capture_output=True)

    def _in(self, name: str, *arguments: str) -> None:
        done = subprocess.run(["ip", "netns", "exec", name, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{' '.join(arguments)}: {done.stderr}"

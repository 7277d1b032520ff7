"""The folder of one cluster, `.baton/<name>/`: what the command must remember between two calls, and nothing outside it.

cluster.json   who it is: marker, keeper's pid, addresses      cluster.yaml   the file as started, paths absolute
ray_token      secret that Ray's processes ask of each other    control_token  secret that the controller asks of its callers
ray/           Ray's own files, while it runs                   logs/          one file a member, kept after `baton down`
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import pathlib
import secrets
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass

from core.errors import ConfigError, Unavailable

MARKER = "BATON_CLUSTER"
"""Environment variable that every process of an embedded cluster inherits; its value is unique to one start."""


QUIET_SCANS = 4
"""Scans in a row that must find nothing: a process in the middle of an exec shows no environment for a moment."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterState:
    """cluster.json."""

    marker: str
    """Value of MARKER in the cluster's processes."""
    keeper_pid: int
    """Process that holds the embedded Ray; 0 when the file names a Ray cluster."""
    control_address: str
    ray_dir: str
    """Where the embedded Ray keeps its files: in the folder, or under /tmp when the folder's path is too long for sockets."""


class ClusterFolder:
    def __init__(self, home: pathlib.Path, name: str) -> None:
        self.name, self.path = name, home.resolve() / name
        self.logs = self.path / "logs"
        self.spec_path = self.path / "cluster.yaml"
        self.ray_token_path = self.path / "ray_token"
        self.control_token_path = self.path / "control_token"
        self.keeper_log = self.logs / "ray.log"
        self._state_path = self.path / "cluster.json"

    def read(self) -> ClusterState | None:
        """None if no cluster of this name was started, or it was taken down."""
        try:
            return ClusterState(**json.loads(self._state_path.read_text()))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(f"{self._state_path} cannot be read ({error}); remove it if no process of the cluster is left") from error

    def write(self, state: ClusterState) -> None:
        """Whole or not at all, also where this process is killed in the midst of it."""
        fresh = self._state_path.with_suffix(".new")
        fresh.write_text(json.dumps(dataclasses.asdict(state), indent=1) + "\n")
        fresh.replace(self._state_path)

    def read_control_token(self) -> str:
        try:
            return self.control_token_path.read_text()
        except OSError as error:
            raise ConfigError(f"{self.control_token_path}: {error.strerror}; without it the controller takes no orders") from error

    def forget(self) -> None:
        """Remove everything but the logs."""
        for path in (self._state_path, self.spec_path, self.ray_token_path, self.control_token_path, self.path / "metrics_targets.json"):
            path.unlink(missing_ok=True)
        shutil.rmtree(self.path / "ray", ignore_errors=True)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """One `up` or `down` of a cluster at a time. Raises ConfigError if another is at work, or the folder cannot be made."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            file = (self.path / "lock").open("w")
        except OSError as error:
            raise ConfigError(f"--home: {self.path} cannot be used: {error.strerror}") from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(f"another baton command is starting or stopping {self.name!r}") from None
            yield


def new_secret(path: pathlib.Path) -> str:
    """A random token in a new file that only its owner may read; an older one is replaced."""
    path.unlink(missing_ok=True)
    token = secrets.token_hex(32)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(token)
    return token


def find_cluster(home: pathlib.Path, name: str | None) -> ClusterFolder:
    """The cluster of this name, or the only one there is. Raises ConfigError naming those there are."""
    running = sorted(path.parent.name for path in home.glob("*/cluster.json")) if home.is_dir() else []
    if name is None and len(running) == 1:
        return ClusterFolder(home, running[0])
    if name in running:
        return ClusterFolder(home, name)
    if not running:
        raise ConfigError(f"no cluster is running (none recorded in {home}); start one with `baton up FILE`")
    wanted = f"no cluster {name!r} is running" if name else "several clusters are running"
    raise ConfigError(f"{wanted}; choose with --name: {', '.join(running)}")


def processes_of(marker: str) -> list[int]:
    """Pids of this machine's processes that carry the marker, this one excepted."""
    wanted = f"{MARKER}={marker}".encode()
    found = []
    for entry in pathlib.Path("/proc").iterdir():
        if not entry.name.isdecimal() or int(entry.name) == os.getpid():
            continue
        try:
            environment = (entry / "environ").read_bytes().split(b"\0")
            is_dead = b"State:\tZ" in (entry / "status").read_bytes()
        except OSError:  # ended meanwhile, or another user's
            continue
        if wanted in environment and not is_dead:
            found.append(int(entry.name))
    return found


def started(pid: int) -> str | None:
    """When a process began, which tells it from a later one of the same number. None: it has ended, and holds no port or memory any more.
    A process that is killed loses its environment and command line first. Then its first thread is a zombie while others end, with all
    that they share."""
    process = pathlib.Path(f"/proc/{pid}")
    try:
        fields = (process / "stat").read_text().rpartition(")")[2].split()
        has_ended = fields[0] in "ZX" and len(list((process / "task").iterdir())) == 1
    except OSError:
        return None
    return None if has_ended else fields[19]


def has_keeper(state: ClusterState) -> bool:
    """Whether the embedded Ray's keeper is alive: without it all the rest is ending. True where the file names a Ray cluster."""
    return not state.marker or state.keeper_pid in processes_of(state.marker)


def end_processes(marker: str, keeper_pid: int, grace_s: float) -> int:
    """Ask the keeper to end, wait, then kill whatever still carries the marker, and wait again, for `grace_s` at most, until what they
    held is free. Returns how many had to be killed. Raises Unavailable naming those that do not end."""
    end, seen = time.monotonic(), set[tuple[int, str | None]]()

    def living() -> list[int]:
        found = processes_of(marker)
        seen.update((pid, started(pid)) for pid in found)
        return found

    if keeper_pid in living():
        os.kill(keeper_pid, signal.SIGTERM)
        end += grace_s
    while living() and time.monotonic() < end:
        time.sleep(0.1)
    killed: set[int] = set()
    num_quiet = 0
    while num_quiet < QUIET_SCANS:
        left = living()
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        killed |= set(left)
        num_quiet = 0 if left else num_quiet + 1
        time.sleep(0.1)
    end = time.monotonic() + grace_s
    while left := [pid for pid, when in seen if when is not None and started(pid) == when]:
        if time.monotonic() > end:
            raise Unavailable(f"processes {left} were told to end and do not: they may hold ports and memory")
        time.sleep(0.05)
    return len(killed)

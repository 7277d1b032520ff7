"""What a cluster's processes hold: memory, file descriptors, shared memory, pages and slots; and what is more than before.

    before = measure(cluster)
    ...
    print(excess(before, measure(cluster)))    # sentences; empty when everything is back at the starting level

Processes come and go while ranks are killed, so levels are compared by kind of process: none may hold more than the one of its kind
that held most at the start, and a stated slack.
"""

from __future__ import annotations

import os
import pathlib
from dataclasses import dataclass

from deploy.folder import processes_of
from tests.support.cluster import Cluster
from tests.support.shared_memory import left_over

RSS_SLACK_BYTES = 96 << 20
"""What the allocators of torch, UCX and gRPC keep after larger batches than before, and Ray's tables of the processes that died."""

FD_SLACK = 12
"""Connections of Ray and gRPC to each other that are made on first need."""

FD_SLACKS = {"log_monitor.py": 220}
"""Ray's reader of log files keeps those of processes that ended open, until it has 200."""


@dataclass(frozen=True, slots=True)
class Level:
    kind: str
    pid: int
    rss_bytes: int
    num_fds: int
    num_threads: int


@dataclass(frozen=True, slots=True)
class Levels:
    processes: tuple[Level, ...]
    shared_memory: frozenset[str]
    """Names of files in /dev/shm that nobody uses."""
    taken: tuple[str, ...]
    """Ranks with pages, slots or requests, and how many."""

    def most(self, kind: str) -> tuple[int, int, int, int]:
        """(processes, resident bytes, descriptors, threads) of a kind, the last three of the process that has most."""
        found = [level for level in self.processes if level.kind == kind]
        parts = [(level.rss_bytes, level.num_fds, level.num_threads) for level in found]
        return (len(found), *(max(column) for column in zip(*parts, strict=True))) if found else (0, 0, 0, 0)  # type: ignore[return-value]

    @property
    def kinds(self) -> list[str]:
        return sorted({level.kind for level in self.processes})


def measure(cluster: Cluster) -> Levels:
    """Raises Unavailable while the controller is away."""
    rows = cluster.rows()
    roles = {row.pid: row.member.role for row in rows.values()}
    levels = []
    for pid in processes_of(cluster.state.marker):
        try:
            levels.append(_level(pid, roles.get(pid)))
        except (FileNotFoundError, ProcessLookupError):  # ended meanwhile
            continue
    taken = []
    for name, row in rows.items():
        load = row.load
        if row.member.role != "router" and (load.pages_free, load.slots_free) != (load.pages_total, load.slots_total):
            taken.append(f"{name}: {load.pages_total - load.pages_free} pages, {load.slots_total - load.slots_free} slots")
        if load.num_running or load.num_waiting:
            taken.append(f"{name}: {load.num_running} requests running, {load.num_waiting} waiting")
    return Levels(tuple(levels), left_over(), tuple(taken))


def excess(before: Levels, after: Levels) -> list[str]:
    found = list(after.taken)
    for kind in sorted({*before.kinds, *after.kinds}):
        count, rss, fds, _ = before.most(kind)
        now_count, now_rss, now_fds, _ = after.most(kind)
        if now_count != count:
            found.append(f"{now_count} processes {kind!r}, {count} before")
        if now_rss > rss + RSS_SLACK_BYTES:
            found.append(f"{kind}: {now_rss >> 20} MiB, {rss >> 20} before")
        if now_fds > fds + FD_SLACKS.get(kind, FD_SLACK):
            found.append(f"{kind}: {now_fds} file descriptors, {fds} before")
    more = sorted(after.shared_memory - before.shared_memory)
    return [*found, *([f"in /dev/shm: {', '.join(more)}"] if more else [])]


def table(before: Levels, after: Levels) -> list[str]:
    """A line a kind: processes, and what the largest of them held before and after."""
    lines = []
    for kind in sorted({*before.kinds, *after.kinds}):
        old, new = before.most(kind), after.most(kind)
        lines.append(
            f"{kind:14} processes {old[0]} -> {new[0]}, MiB {old[1] >> 20} -> {new[1] >> 20}, "
            f"descriptors {old[2]} -> {new[2]}, threads {old[3]} -> {new[3]}"
        )
    return lines


def _level(pid: int, role: str | None) -> Level:
    process = pathlib.Path(f"/proc/{pid}")
    words = process.joinpath("cmdline").read_bytes().decode(errors="replace").split("\0")
    status = dict(line.split(":", 1) for line in process.joinpath("status").read_text().splitlines())
    return Level(
        kind=role or program_of(words),
        pid=pid,
        rss_bytes=int(status["VmRSS"].split()[0]) << 10,
        num_fds=len(os.listdir(process / "fd")),
        num_threads=int(status["Threads"]),
    )


def program_of(words: list[str]) -> str:
    """The name by which one knows a process from its command line: the program, or the script that an interpreter runs.

    A title that a process gave itself is one word with spaces, of which the first counts; a path may have spaces, too.
    """
    spoken = [word if word.startswith("/") else word.split()[0] for word in words if word.split()]
    return next((pathlib.Path(word).name for word in spoken if not _is_python(word)), "python")


def _is_python(word: str) -> bool:
    return word.startswith("-") or "python" in pathlib.Path(word).name

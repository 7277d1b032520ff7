"""`baton logs`: the ends of log files, and their growth."""

from __future__ import annotations

import collections
import contextlib
import os
import pathlib
import time
from typing import BinaryIO

from core.errors import ConfigError
from deploy.folder import ClusterFolder
from deploy.output import before

POLL_S = 0.3

BLOCK_BYTES = 65_536


def print_logs(folder: ClusterFolder, member: str | None, num_lines: int, is_following: bool) -> None:
    """Print the last lines of one member's file, or of all; with `is_following` go on until interrupted, also when a file is too long
    and begins anew (`output.py`), and when the cluster is started anew, which removes the files."""
    places: dict[pathlib.Path, tuple[int, int]] = {}  # the file's number, and how far it was read
    paths, is_first_look, is_named = choose(folder, member), True, member is None
    while True:
        is_named = is_named or len(paths) > 1
        for path in paths:
            with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
                status = os.fstat(file.fileno())
                number, start = places.get(path, (status.st_ino, 0))
                rest = []
                if number != status.st_ino:
                    rest, start = left_behind(path, number, start), 0
                start = start_of_last(file, num_lines) if is_first_look else start
                file.seek(start if start <= status.st_size else 0)
                lines = collections.deque(file, maxlen=num_lines if is_first_look else None)
                end = file.tell()
                if is_following and lines and not lines[-1].endswith(b"\n"):  # not all of it is written
                    end -= len(lines.pop())
                places[path] = status.st_ino, end
                for line in [*rest, *lines]:
                    _print(path, line, is_named)
        if not is_following:
            return
        is_first_look = False
        time.sleep(POLL_S)
        with contextlib.suppress(ConfigError):  # none for a moment
            paths = choose(folder, member)


def choose(folder: ClusterFolder, member: str | None) -> list[pathlib.Path]:
    """The log files meant: all, or those of "decode/0.0", "decode/0", "decode" or "controller". Raises ConfigError."""
    paths = sorted(folder.logs.glob("*.log"))
    if member is None:
        return paths
    stem = member.replace("/", "-")
    chosen = [path for path in paths if path.stem == stem or path.stem.startswith((f"{stem}.", f"{stem}-"))]
    if not chosen:
        known = ", ".join(path.stem.replace("-", "/", 1) for path in paths)
        raise ConfigError(f"no log of {member!r}; there are {known or 'none'}")
    return chosen


def left_behind(path: pathlib.Path, number: int, start: int) -> list[bytes]:
    """What came after `start` in the file of that number, which was `path` until it was too long."""
    with contextlib.suppress(FileNotFoundError), before(path).open("rb") as file:
        if os.fstat(file.fileno()).st_ino == number:
            file.seek(start)
            return file.readlines()
    return []


def start_of_last(file: BinaryIO, num_lines: int) -> int:
    """A place not far before the last so many lines, looked for from the end: what a cluster that runs for weeks has said is long."""
    start, num_ends = file.seek(0, os.SEEK_END), 0
    while start and num_ends <= num_lines:
        size = min(start, BLOCK_BYTES)
        start = file.seek(start - size)
        num_ends += file.read(size).count(b"\n")
    return start


def _print(path: pathlib.Path, line: bytes, is_named: bool) -> None:
    text = line.decode(errors="replace").rstrip("\n")
    print(f"{path.stem}: {text}" if is_named else text, flush=True)

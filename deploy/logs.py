"""`baton logs`: the ends of log files, and their growth."""

from __future__ import annotations

import collections
import pathlib
import time

from core.errors import ConfigError
from deploy.folder import ClusterFolder

POLL_S = 0.3


def print_logs(folder: ClusterFolder, member: str | None, num_lines: int, is_following: bool) -> None:
    """Print the last lines of one member's file, or of all; with `is_following` go on until interrupted."""
    paths = choose(folder, member)
    offsets = {}
    for path in paths:
        with path.open("rb") as file:
            lines = collections.deque(file, maxlen=num_lines)
            offsets[path] = file.tell()
        for line in lines:
            _print(path, line, len(paths) > 1)
    while is_following:
        for path in choose(folder, member):
            with path.open("rb") as file:
                file.seek(offsets.get(path, 0))
                for line in file:
                    _print(path, line, member is None)
                offsets[path] = file.tell()
        time.sleep(POLL_S)


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


def _print(path: pathlib.Path, line: bytes, is_named: bool) -> None:
    text = line.decode(errors="replace").rstrip("\n")
    print(f"{path.stem}: {text}" if is_named else text, flush=True)

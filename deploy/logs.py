"""`baton logs`: the ends of log files, and their growth."""

from __future__ import annotations

import collections
import contextlib
import pathlib
import time

from core.errors import ConfigError
from deploy.folder import ClusterFolder

POLL_S = 0.3


def print_logs(folder: ClusterFolder, member: str | None, num_lines: int, is_following: bool) -> None:
    """Print the last lines of one member's file, or of all; with `is_following` go on until interrupted, also when the cluster is
    started anew, which empties the files."""
    offsets: dict[pathlib.Path, int] = {}
    paths, is_first_look, is_named = choose(folder, member), True, member is None
    while True:
        is_named = is_named or len(paths) > 1
        for path in paths:
            with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
                start = offsets.get(path, 0)
                file.seek(start if start <= path.stat().st_size else 0)
                lines = collections.deque(file, maxlen=num_lines if is_first_look else None)
                offsets[path] = file.tell()
                if is_following and lines and not lines[-1].endswith(b"\n"):  # not all of it is written
                    offsets[path] -= len(lines.pop())
                for line in lines:
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


def _print(path: pathlib.Path, line: bytes, is_named: bool) -> None:
    text = line.decode(errors="replace").rstrip("\n")
    print(f"{path.stem}: {text}" if is_named else text, flush=True)

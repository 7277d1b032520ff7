"""Shared memory that nobody uses any more. Clusters of other tests may run at the same time, so what matters is who holds a file, not
which files there are."""

from __future__ import annotations

import contextlib
import os
import pathlib
import time

FOLDER = "/dev/shm"


def left_over(before: frozenset[str] = frozenset(), patience_s: float = 0.0) -> frozenset[str]:
    """Names of files in /dev/shm that no process of this machine has mapped or open, beside `before`. What is there for less than
    `patience_s` does not count: a file is on its way out while its last process ends."""
    end = time.monotonic() + patience_s
    while True:
        names = set(os.listdir(FOLDER)) - before
        found = frozenset(names - _held()) if names else frozenset()
        if not found or time.monotonic() >= end:
            return found
        time.sleep(0.1)


def _held() -> set[str]:
    """Names that the processes of this machine that may be looked at have open or mapped."""
    paths = []
    for process in pathlib.Path("/proc").iterdir():
        if process.name.isdigit():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):  # it ended, or is not ours
                paths += [line.split(maxsplit=5)[5] for line in (process / "maps").read_text().splitlines() if FOLDER in line]
                for number in os.listdir(process / "fd"):
                    with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                        paths.append(os.readlink(process / "fd" / number))
    return {path.removeprefix(f"{FOLDER}/") for path in paths if path.startswith(FOLDER)}

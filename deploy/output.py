"""Where the output of a member goes: into a file and the one before it, so that a cluster that runs for months does not fill the disk."""

from __future__ import annotations

import contextlib
import os
import pathlib
import threading
import time

MOST_BYTES = 64 << 20
"""Of a file, as it is seen every LOOK_S."""
LOOK_S = 2.0


def send_output_to(path: pathlib.Path, most_bytes: int = MOST_BYTES, look_s: float = LOOK_S) -> None:
    """Make `path` the standard output and error of this process, native libraries included. As long as the process lives, a file that has
    more than `most_bytes` becomes `before(path)`, in the place of the one that was that, and `path` begins anew."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _open(path)
    threading.Thread(target=_keep_short, args=(path, most_bytes, look_s), name="output", daemon=True).start()


def before(path: pathlib.Path) -> pathlib.Path:
    """The file that was `path` until that was too long."""
    return path.with_name(f"{path.name}.1")


def _open(path: pathlib.Path) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    os.close(descriptor)


def _keep_short(path: pathlib.Path, most_bytes: int, look_s: float) -> None:
    while True:
        time.sleep(look_s)
        if os.fstat(1).st_size > most_bytes:
            with contextlib.suppress(OSError):  # somebody has removed it, or the disk is full: then it goes on as it is
                path.replace(before(path))
                _open(path)

"""What the tools' command lines share: the form of their lists, and how a result says what made it."""

from __future__ import annotations

import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]


def ints(text: str) -> list[int]:
    """ "1,32,128", for `add_argument`."""
    return [int(part) for part in text.split(",") if part]


def pairs(text: str) -> list[tuple[int, int]]:
    """ "8192x1024,4096x1024", for `add_argument`."""
    return [(int(first), int(second)) for first, second in (part.split("x") for part in text.split(",") if part)]


def command() -> str:
    """That which runs, as it is typed in the repository's folder, wherever that lies."""
    return " ".join(["python -m", f"tests.benchmarks.{pathlib.Path(sys.argv[0]).stem}", *sys.argv[1:]])


def commit() -> str:
    """Of this repository, in short; empty where git does not know it."""
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return found.stdout.strip()

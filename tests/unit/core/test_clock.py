"""What decides anything reads `core.clock`: the machine's date may be set while it runs, and the simulation has a time of its own."""

from __future__ import annotations

import ast
import pathlib

import pytest

from core.clock import SystemClock
from tests.support.manual_clock import ManualClock

ROOT = pathlib.Path(__file__).resolve().parents[3]
FOLDERS = ("core", "kv_transfer", "prefill_worker", "decode_worker", "router", "engine/scheduler")
WALL_CLOCK = {"time.time", "time.time_ns", "time.monotonic", "time.perf_counter", "datetime.datetime.now", "datetime.datetime.utcnow"}
CHANCE = {"random.random", "random.randrange", "random.choice", "random.uniform", "random.shuffle"}
DATES = {"router/completions.py", "router/chat.py", "router/app.py"}
"""They tell clients when something was created, and decide nothing by it."""


def calls_in(source: str) -> set[str]:
    """Dotted names of what is called."""
    return {ast.unparse(node.func) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)}


def test_no_decision_reads_the_date_or_draws_at_random() -> None:
    found = set()
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = str(path.relative_to(ROOT))
            called = calls_in(path.read_text()) & (WALL_CLOCK | CHANCE)
            if called and name != "core/clock.py" and not (name in DATES and called == {"time.time"}):
                found.add(f"{name}: {', '.join(sorted(called))}")
    assert not found
    assert calls_in((ROOT / "core/clock.py").read_text()) & WALL_CLOCK == {"time.monotonic"}, "the search finds what it is meant to"


def test_a_clock_never_goes_back() -> None:
    clock = SystemClock()
    times = [clock.now() for _ in range(100)]
    assert times == sorted(times)
    manual = ManualClock(5.0)
    with pytest.raises(AssertionError):
        manual.advance(-1.0)
    assert manual.now() == 5.0

"""Commands in results are those that are typed in the repository's folder, wherever it lay."""

from __future__ import annotations

import pathlib
import re
import sys

import pytest

from tests.benchmarks.command_line import command

RESULTS = pathlib.Path(__file__).parents[2] / "benchmarks/results"


def test_a_command_does_not_say_where_the_repository_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/tests/benchmarks/bench_engine.py", "--ranks", "2"])
    assert command() == "python -m tests.benchmarks.bench_engine --ranks 2"


def test_no_result_says_where_the_repository_lay() -> None:
    found = {path.name: re.findall(r'"command": "([^"]*)"', path.read_text()) for path in RESULTS.glob("*.json")}
    assert sum(map(len, found.values())) > 10
    assert {name: one for name, commands in found.items() for one in commands if "/tests/benchmarks/" in one.split(" --")[0]} == {}

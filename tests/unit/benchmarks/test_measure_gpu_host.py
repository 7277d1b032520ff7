"""The script for GPU hosts names modules, tests and options that exist, and goes on after a step that fails."""

from __future__ import annotations

import pathlib
import shlex
import subprocess
import sys

import pytest

from tests.support.patience import overload

ROOT = pathlib.Path(__file__).parents[3]
SCRIPT = "tests/benchmarks/measure_gpu_host.sh"


def test_every_command_can_be_meant() -> None:
    lines = subprocess.run(["sh", SCRIPT, "--list"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    tools = set()
    for line in lines:
        words = line.split()
        assert words[1] == "-m"
        if words[2] == "pytest":
            assert all((ROOT / word).exists() for word in words if word.startswith("tests/")), line
            continue
        tools.add(words[2])
        source = (ROOT / words[2].replace(".", "/")).with_suffix(".py").read_text()
        assert [word for word in words if word.startswith("--") and f'"{word}"' not in source] == [], line
    named = {"bench_engine", "bench_ops", "bench_steps", "bench_transfer", "bench_exchange", "timeline"}
    assert tools == {f"tests.benchmarks.{name}" for name in named}


@pytest.mark.parametrize(("minutes", "ended"), [(1, "status 3 after"), (0, "not begun, out of time")])
def test_a_step_that_fails_or_comes_too_late_is_said_and_the_next_one_has_its_turn(
    tmp_path: pathlib.Path, minutes: int, ended: str
) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\n[ "$1" = -c ] && exec {shlex.quote(sys.executable)} -c "print(1)"\necho said\nexit 3\n')
    python.chmod(0o755)
    out = tmp_path / "out"
    command = ["sh", SCRIPT, str(out), str(minutes)]
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": str(python)}
    subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, timeout=30 * overload(), check=True)
    summary = (out / "summary.txt").read_text().splitlines()
    assert len(summary) == 10 and all(ended in line for line in summary), summary
    assert (out / "decode.log").exists() == (minutes > 0)

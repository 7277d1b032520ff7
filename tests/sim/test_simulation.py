"""Worlds by the thousand: whatever goes wrong in them, the rules of `tests/sim/world.py` hold. `make worlds` runs many more."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest

from tests.sim.many import run_many

ROOT = pathlib.Path(__file__).resolve().parents[2]

WORLDS_PER_BLOCK = 1000
NUM_BLOCKS = 2


@pytest.mark.parametrize("block", range(NUM_BLOCKS))
def test_every_request_ends_once_with_the_right_tokens_and_nothing_leaks(block: int) -> None:
    first = WORLDS_PER_BLOCK * block
    tally = run_many(range(first, first + WORLDS_PER_BLOCK), stop=lambda rule: True)
    told = "; ".join(f"world {seed}: {rule}\n(python -m tests.sim --seed {seed} tells its story)" for seed, rule in tally.broken.items())
    assert not tally.broken, told
    outcomes, repairs = tally.outcomes, tally.repairs
    assert outcomes["ok"] > 2000 and outcomes["cancelled"] > 150 and outcomes["Overloaded"] > 5, f"the worlds must do some work: {tally}"
    assert {"killed", "stopped", "cut", "connection", "write", "stalls", "drained", "clock", "fails", "loses"} <= tally.faults.keys()
    assert repairs["retries"] > 200 and repairs["hand-ons"] > 200 and repairs["kept pages"] > 60, f"{repairs}"


def test_a_seed_tells_the_same_story_in_every_process() -> None:
    stories = set()
    for hash_seed in ("1", "2"):
        made = subprocess.run(
            [sys.executable, "-m", "tests.sim", "--seed", "36"],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        )
        stories.add(made.stdout)
    (story,) = stories
    assert "asks:" in story and "ends: ok" in story and "***" in story

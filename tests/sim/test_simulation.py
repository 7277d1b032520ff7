"""Worlds by the thousand: whatever goes wrong in them, the rules of `tests/sim/world.py` hold."""

from __future__ import annotations

import gc
import os
import pathlib
import subprocess
import sys
from collections import Counter

import pytest

from tests.sim.patches import run_world

ROOT = pathlib.Path(__file__).resolve().parents[2]

WORLDS_PER_BLOCK = 500
NUM_BLOCKS = 16


def run_block(seeds: range) -> tuple[Counter[str], Counter[str], Counter[str]]:
    """Outcomes of requests, faults, and what the routers had to do, over all worlds."""
    gc.freeze()  # what pytest holds need not be looked at after every few worlds
    outcomes, faults, repairs = Counter[str](), Counter[str](), Counter[str]()
    for seed in seeds:
        try:
            world = run_world(seed)
        except BaseException as error:
            raise AssertionError(f"world {seed}: {error}\n(python -m tests.sim --seed {seed} tells its story)") from error
        outcomes.update(client.outcome for client in world.clients)
        faults.update(world.faults)
        repairs["retries"] += sum(one.relay.num_migrations for one in world.routers)
        repairs["kept pages"] += world.num_kept_pages
        repairs["hand-ons"] += sum(client.journey.hand_ons for client in world.clients if client.journey is not None)
    return outcomes, faults, repairs


@pytest.mark.parametrize("block", range(NUM_BLOCKS))
def test_every_request_ends_once_with_the_right_tokens_and_nothing_leaks(block: int) -> None:
    outcomes, faults, repairs = run_block(range(WORLDS_PER_BLOCK * block, WORLDS_PER_BLOCK * (block + 1)))
    assert outcomes["ok"] > 800 and outcomes["cancelled"] > 80 and outcomes["Overloaded"] > 5, f"the worlds must do some work: {outcomes}"
    assert {"killed", "stopped", "cut", "connection", "write", "stalls", "drained", "clock", "fails", "loses"} <= faults.keys()
    assert repairs["retries"] > 50 and repairs["hand-ons"] > 10 and repairs["kept pages"] > 20, f"{repairs}"


@pytest.mark.slow
@pytest.mark.parametrize("block", range(200))
def test_a_hundred_thousand_worlds(block: int) -> None:
    start = 1_000_000 + WORLDS_PER_BLOCK * block
    run_block(range(start, start + WORLDS_PER_BLOCK))


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

"""README's table of faults names tests and scenarios that exist."""

from __future__ import annotations

import pathlib
import re

from tests.sim.scenarios import SCENARIOS

ROOT = pathlib.Path(__file__).resolve().parents[3]


def test_every_test_and_scenario_that_is_named_exists() -> None:
    text = (ROOT / "kv_transfer" / "README.md").read_text()
    table = text.partition("| what happens |")[2].partition("\n\n")[0]
    tests = set(re.findall(r"`(test_\w+)`", table))
    scenarios = set(re.findall(r'"([^"]+)"', table))
    defined = {name for path in (ROOT / "tests").rglob("test_*.py") for name in re.findall(r"def (test_\w+)\(", path.read_text())}
    assert len(tests) > 20 and tests <= defined, tests - defined
    assert len(scenarios) > 5 and scenarios <= set(SCENARIOS), scenarios - set(SCENARIOS)

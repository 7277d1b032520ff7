from __future__ import annotations

import pytest

from tests.sim.scenarios import SCENARIOS, run_scenario


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_scenario_comes_out_as_told(name: str) -> None:
    run_scenario(name, print)

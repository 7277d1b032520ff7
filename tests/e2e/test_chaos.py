"""Minutes of chaos on a real cluster: exact answers, none lost, nothing left behind. Half an hour: python -m tests.benchmarks.chaos."""

from __future__ import annotations

import asyncio
import pathlib
import random

import pytest

from tests.support.chaos import Chaos, ChaosCluster

pytestmark = pytest.mark.e2e

MINUTES = 3


def test_kills_cuts_and_storms_lose_no_request_change_no_token_and_leave_nothing(tmp_path: pathlib.Path, rng: random.Random) -> None:
    with ChaosCluster(tmp_path) as cluster:
        report = asyncio.run(Chaos(cluster, rng.randrange(2**32), num_clients=3, num_scenarios=21).run(MINUTES))
        assert not report.problems, "\n".join(report.problems) + f"\n{cluster.logs()}"
        assert report.num_finished > MINUTES and report.num_events > MINUTES, f"it was no chaos: {report}"

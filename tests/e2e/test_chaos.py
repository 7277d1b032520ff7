"""Chaos on a real cluster, one blow after the other: exact answers, none lost, nothing left behind.

Half an hour at a calmer pace: python -m tests.benchmarks.chaos.
"""

from __future__ import annotations

import asyncio
import pathlib
import random

import pytest

from tests.support.chaos import Chaos, ChaosCluster

pytestmark = pytest.mark.e2e

MINUTES = 1.5
PACE_S = (1.0, 3.5)


def test_kills_cuts_and_storms_lose_no_request_change_no_token_and_leave_nothing(tmp_path: pathlib.Path, rng: random.Random) -> None:
    with ChaosCluster(tmp_path) as cluster:
        report = asyncio.run(Chaos(cluster, rng.randrange(2**32), num_scenarios=21, pace_s=PACE_S).run(MINUTES))
        assert not report.problems, "\n".join(report.problems) + f"\n{cluster.logs()}"
        assert report.num_finished > 15 and report.num_events > 15, "it was chaos"

"""A thousand streams leave at the same moment."""

from __future__ import annotations

import asyncio

import pytest

from tests.support.storm import Storm, StormServing, quantile, storm

NUM_CANCELLED, NUM_SURVIVORS = 1000, 50
STEP_S = 0.5

TRIES = 3
"""Whatever else the machine does only adds time: one storm that is over in time shows that it can be."""


def too_slow(found: Storm) -> str:
    """What took too long; empty if nothing did."""
    if found.free_s >= 2.0:
        return f"the pages came free after {found.free_s:.2f} s"
    for part in (0.5, 0.99):
        before, after = quantile(found.gaps_before, part), quantile(found.gaps_after, part)
        if after > 2 * before:
            return f"quantile {part} of the time between tokens of those who stayed: {before:.3f} s before, {after:.3f} s after"
    return ""


@pytest.mark.slow
def test_a_thousand_cancelled_streams_free_their_pages_and_the_others_go_on() -> None:
    problems = []
    with StormServing(NUM_CANCELLED + NUM_SURVIVORS, STEP_S) as serving:
        for _ in range(TRIES):
            found = asyncio.run(storm(serving, num_cancelled=NUM_CANCELLED, num_survivors=NUM_SURVIVORS))
            assert found.pages_before == NUM_CANCELLED + NUM_SURVIVORS, "all were streaming"
            assert found.num_survivor_errors == 0
            serving.wait(serving.is_empty)
            serving.wait(lambda: serving.router.num_requests == 0)
            problems.append(too_slow(found))
            if not problems[-1]:
                return
    raise AssertionError("; ".join(problems))

"""Many streams leave at the same moment: when are their pages free, and what do the others notice?

    python -m tests.benchmarks.bench_cancel_storm --cancelled 1000 --survivors 50 --step 0.5 --runs 3

Router, prefill and decode rank, and the clients share this process; the model is NullRunner. A line of JSON a run.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging

from tests.support.storm import StormServing, quantile, storm


def run(num_cancelled: int, num_survivors: int, step_s: float) -> dict[str, float]:
    with StormServing(num_cancelled + num_survivors, step_s) as serving:
        found = asyncio.run(storm(serving, num_cancelled=num_cancelled, num_survivors=num_survivors))
        serving.wait(serving.is_empty)
    figures = {"cancelled": num_cancelled, "survivors": num_survivors, "step_s": step_s, "free_s": found.free_s}
    for name, gaps in (("before", found.gaps_before), ("after", found.gaps_after)):
        figures |= {f"itl_{name}_p50_s": quantile(gaps, 0.5), f"itl_{name}_p99_s": quantile(gaps, 0.99), f"itl_{name}_max_s": max(gaps)}
    return {key: round(value, 4) for key, value in figures.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cancelled", type=int, default=1000)
    parser.add_argument("--survivors", type=int, default=50)
    parser.add_argument("--step", type=float, default=0.5, help="seconds of a decode step")
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    logging.getLogger("baton").setLevel(logging.ERROR)
    for _ in range(options.runs):
        print(json.dumps(run(options.cancelled, options.survivors, options.step)), flush=True)


if __name__ == "__main__":
    main()

"""Print the transcript of one simulated world, or run many.

python -m tests.sim --seed 673            what happened, line by line, and the broken rule if there is one
python -m tests.sim --scenario NAME       a story with a plot (`tests/sim/scenarios.py`)
python -m tests.sim --worlds 100000       seeds 0 to 99,999; the seeds of those that broke a rule
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections import Counter

from tests.sim.patches import run_world
from tests.sim.scenarios import SCENARIOS, run_scenario


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of the world to print, or of the first one to run")
    parser.add_argument("--worlds", type=int, default=0, help="how many to run, without transcripts")
    parser.add_argument("--scenario", choices=sorted(SCENARIOS), metavar="NAME", help=", ".join(sorted(SCENARIOS)))
    arguments = parser.parse_args()
    if arguments.scenario:
        run_scenario(arguments.scenario, print)
        return 0
    if not arguments.worlds:
        world = run_world(arguments.seed, print)
        print(f"world {arguments.seed}: every rule held; faults: {', '.join(world.faults) or 'none'}")
        return 0
    broken: list[int] = []
    outcomes: Counter[str] = Counter()
    gc.set_threshold(50_000)
    began = time.process_time()
    for seed in range(arguments.seed, arguments.seed + arguments.worlds):
        try:
            outcomes.update(client.outcome for client in run_world(seed).clients)
        except AssertionError as error:
            broken.append(seed)
            print(f"world {seed}: {error}", file=sys.stderr)
    seconds = time.process_time() - began
    print(
        f"{arguments.worlds} worlds in {seconds:.0f} s of CPU time ({arguments.worlds / seconds:.0f} a second), {len(broken)} broke a rule"
    )
    print("requests: " + ", ".join(f"{count} {outcome}" for outcome, count in outcomes.most_common()))
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())

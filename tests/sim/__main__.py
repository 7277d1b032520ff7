"""Print the transcript of one simulated world, or run many.

python -m tests.sim --seed 673            what happened, line by line, and the broken rule if there is one
python -m tests.sim --scenario NAME       a story with a plot (`tests/sim/scenarios.py`)
python -m tests.sim --worlds 100000       seeds 0 to 99,999, on all cores; the seeds of those that broke a rule, and what happened in all
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import signal
import sys
import time
from collections import Counter

from tests.sim.many import Tally, run_many
from tests.sim.patches import run_world
from tests.sim.scenarios import SCENARIOS, run_scenario

WORLDS_PER_BLOCK = 1000
"""Given to a process at once."""


def run_worlds(seeds: range, num_processes: int) -> int:
    """The exit status. Prints what happened, and which seeds broke a rule as soon as they did."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # as an exception: the pool ends its processes
    blocks = [seeds[start : start + WORLDS_PER_BLOCK] for start in range(0, len(seeds), WORLDS_PER_BLOCK)]
    tally, began = Tally(), time.monotonic()
    with multiprocessing.Pool(num_processes) as pool:
        for number, part in enumerate(pool.imap_unordered(run_many, blocks), 1):
            for seed, rule in part.broken.items():
                print(f"world {seed}: {rule}", file=sys.stderr)
            tally.add(part)
            if number % 10 == 0:
                done = min(number * WORLDS_PER_BLOCK, len(seeds))
                print(f"{done} of {len(seeds)} worlds, {time.monotonic() - began:.0f} s", file=sys.stderr)
        pool.close()
        pool.join()
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s, wall_s = used.ru_utime + used.ru_stime, time.monotonic() - began
    print(f"{len(seeds)} worlds in {cpu_s:.0f} s of CPU time ({len(seeds) / cpu_s:.0f} a second), {len(tally.broken)} broke a rule")
    print(f"{num_processes} processes, {wall_s:.0f} s")
    print(f"events: {tally.num_events}, virtual time: {tally.virtual_s:.0f} s")
    for what, counts in (("requests", tally.outcomes), ("faults", tally.faults), ("repairs", tally.repairs)):
        print(f"{what}: " + _listed(counts))
    return 1 if tally.broken else 0


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.most_common())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of the world to print, or of the first one to run")
    parser.add_argument("--worlds", type=int, default=0, help="how many to run, without transcripts")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="that run them")
    parser.add_argument("--scenario", choices=sorted(SCENARIOS), metavar="NAME", help=", ".join(sorted(SCENARIOS)))
    arguments = parser.parse_args()
    if arguments.scenario:
        run_scenario(arguments.scenario, print)
        return 0
    if not arguments.worlds:
        world = run_world(arguments.seed, print)
        print(f"world {arguments.seed}: every rule held; faults: {', '.join(world.faults) or 'none'}")
        return 0
    return run_worlds(range(arguments.seed, arguments.seed + arguments.worlds), arguments.processes)


if __name__ == "__main__":
    sys.exit(main())

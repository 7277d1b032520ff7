"""Half an hour of chaos on one machine: real processes, mixed traffic, and every few seconds a kill -9, a cut or a storm of cancels.

    python -m tests.benchmarks.chaos --minutes 30 --seed 1 [--out FILE]

Starts a cluster of its own (two prefill and two decode ranks with the demo model, checked mode), prints what happens and a summary, and
exits with 1 if a claim of tests/support/chaos.py did not hold; then the cluster's logs are kept and their folder is named. The seed gives
traffic and events; when exactly they meet is up to the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import pathlib
import shutil
import sys
import tempfile
import time

from tests.support.chaos import Chaos, ChaosCluster


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=None, help="default: of the time")
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--scenarios", type=int, default=42)
    parser.add_argument("--out", type=pathlib.Path, default=None, help="file for the transcript")
    options = parser.parse_args()
    seed = int(time.time()) if options.seed is None else options.seed
    lines: list[str] = []

    def say(line: str) -> None:
        lines.append(line)
        print(line, flush=True)

    home = pathlib.Path(tempfile.mkdtemp(prefix="baton-chaos-"))
    try:
        with ChaosCluster(home) as cluster:
            chaos = Chaos(cluster, seed, num_clients=options.clients, num_scenarios=options.scenarios, say=say)
            report = asyncio.run(chaos.run(options.minutes))
    finally:
        if options.out is not None:
            options.out.write_text("\n".join(lines) + "\n")
    if report.problems:
        print(f"logs: {cluster.folder.logs}", file=sys.stderr)
        return 1
    shutil.rmtree(home)
    return 0


if __name__ == "__main__":
    sys.exit(main())

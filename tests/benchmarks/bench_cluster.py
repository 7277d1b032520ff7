"""Start a cluster from its file, load it at rising concurrency, take it down: tables, plot and every request's times in one folder.

python -m tests.benchmarks.bench_cluster --out FOLDER [--file deploy/clusters/h200_flash_1p1d.yaml] [--routing even]
    [--shapes 8192x1024,4096x1024] [--concurrency 1,4,16,64,128,256] [--requests 2] [--budget-s 540] [--keep] [--tiny]
    [--skew 0.6] [--around-moves] [KEY=VALUE ...]

A shape is prompt tokens x output tokens, exact, `ignore_eos`. At each concurrency so many clients send `--requests` each, one after the
other; where that would be more than FEW_REQUESTS in all they share those, but each sends one. No point is begun that would end after
`--budget-s`, judged by the one before it; every point is written when it is done, and a second call with the same folder goes on after
them. `--keep` leaves the cluster up, and a call that finds it up uses it.

With `load: dummy`, `--routing` says how experts are chosen:

    scored   as the published config.json has it. Dummy hidden states are alike, so few experts are used: faster than a real model
    even     by token id in all layers, each expert as likely
    skewed   by token id in all layers, the n-th most popular expert with weight n^-SKEW

What moving experts brings: `--routing skewed --around-moves engine.rebalance_interval_s=45`. Each point is then measured three
times: twice at once, and when experts have moved, until when there are small loads that are not counted. An interval (which begins with the
first request) that ends in the second time makes the first one of experts that have not moved; the report says when they did.

`--tiny` is the same run on CPUs of this machine, with a model of the same structure and a few layers: that the way there works.

Writes in FOLDER: ROUTING.md and ROUTING.png (output tokens/s a GPU against tokens/s a user), ROUTING.json (all figures),
ROUTING.times.json.gz (the times of every token of every request, by point), ROUTING.start.txt (what `baton up` said, memory plans, chosen
ops, graphs) and logs.tar.gz.
"""

from __future__ import annotations

import argparse
import asyncio
import gzip
import json
import pathlib
import subprocess
import sys
import tarfile
import time
from typing import Any

from deploy.folder import ClusterFolder
from deploy.spec import ClusterSpec, load_spec
from router.tokens import TextCodec
from tests.benchmarks import cluster_metrics
from tests.benchmarks.bench_serving import Outcome, Workload, run_load, summarise, table
from tests.benchmarks.cluster_report import devices, plot, report
from tests.benchmarks.command_line import commit, ints, pairs
from tests.benchmarks.tiny_cluster import tiny_overrides

ROOT = pathlib.Path(__file__).resolve().parents[2]
FEW_REQUESTS = 128
STAGES = ("before experts move", "while they move", "after")
SETTLE_S = 60.0
"""For experts to move in."""
TOLD = ("engine.memory", "engine.op ", "graphs.captured", "rank.ready", "experts.")
"""Lines of the ranks' logs that belong into the record of a start."""


class Bench:
    """One cluster with one routing, and the record of its points."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.out = options, options.out.resolve()
        self.out.mkdir(parents=True, exist_ok=True)
        self.overrides = self._overrides()
        self.spec: ClusterSpec = load_spec(options.file, self.overrides)
        self.folder = ClusterFolder(options.home, self.spec.name)
        self.gpus = sum(self.spec.replicas(role) * self.spec.ranks_per_replica(role) for role in ("prefill", "decode"))
        self.record: dict[str, Any] = {"points": []}
        self.times: list[list[dict[str, Any]]] = []
        """Of every point's requests."""
        if self._path("json").exists():
            self.record = json.loads(self._path("json").read_text())
            self.times = json.loads(gzip.decompress(self._path("times.json.gz").read_bytes()))

    def _path(self, ending: str) -> pathlib.Path:
        return self.out / f"{self.options.routing}.{ending}"

    def _overrides(self) -> list[str]:
        found = tiny_overrides(self.out) if self.options.tiny else []
        if self.options.routing != "scored":
            folder = load_spec(self.options.file, [*found, *self.options.overrides]).model_path
            config = json.loads((folder / "config.json").read_text())
            hashed = self.out / f"{folder.name}_hashed"
            hashed.mkdir(exist_ok=True)
            (hashed / "config.json").write_text(json.dumps(config | {"num_hash_layers": config["num_hidden_layers"]}))
            found.append(f"model.path={hashed}")
        if self.options.routing == "skewed":
            found.append(f"engine.dummy_skew={self.options.skew}")
        return [*found, *self.options.overrides]

    # -- the cluster -----------------------------------------------------------------------------------------------------------

    def baton(self, *arguments: str) -> tuple[int, str]:
        """(exit status, what was said), said here as it comes."""
        command = [sys.executable, "-m", "deploy", "--home", str(self.options.home), *arguments]
        said = [f"$ baton {' '.join(arguments)}\n"]
        with subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, text=True
        ) as running:
            assert running.stdout is not None
            for line in running.stdout:
                print(line, end="", flush=True)
                said.append(line)
        return running.returncode, "".join(said)

    def up(self) -> None:
        began = time.monotonic()
        status, output = self.baton("up", str(self.options.file), *self.overrides)
        if status or "start s" not in self.record:
            self.record["start s"] = round(time.monotonic() - began, 1)
            self.record_start(output)
        if status:
            raise SystemExit("the cluster did not start")

    def record_start(self, output: str) -> None:
        told = [output, self.baton("status", "-n", self.spec.name)[1]]
        for path in sorted(self.folder.logs.glob("*.log")):
            lines = [line for line in path.read_text(errors="replace").splitlines() if any(word in line for word in TOLD)]
            told += [f"\n{path.name}", *lines]
        self._path("start.txt").write_text("\n".join(told) + "\n")
        self.pack_logs()

    def pack_logs(self) -> None:
        with tarfile.open(self.out / "logs.tar.gz", "w:gz") as archive:
            for path in sorted(self.folder.logs.glob("*.log")):
                archive.add(path, path.name)

    def down(self) -> None:
        self.baton("down", "-n", self.spec.name)
        self.pack_logs()

    # -- the load --------------------------------------------------------------------------------------------------------------

    def workload(self, prompt: int, output: int) -> Workload:
        known = TextCodec(self.spec.model.tokenizer_folder).vocab_size
        host = {"0.0.0.0": "127.0.0.1"}.get(self.spec.router.host, self.spec.router.host)
        return Workload(
            url=f"http://{host}:{self.spec.router.port}",
            model=self.spec.served_name,
            vocab=(min(300, known // 2), min(known, 128_000)),  # above are special tokens
            input_len=prompt,
            output_len=output,
            range_ratio=1.0,
            api_key="",
            timeout_s=self.spec.router.request_timeout_s + 60,
        )

    def run(self) -> None:
        stages = STAGES if self.options.around_moves else ("",)
        points = [(shape, clients, stage) for shape in self.options.shapes for clients in self.options.concurrency for stage in stages]
        done = {(tuple(point["shape"]), point["clients"], point["stage"]) for point in self.record["points"]}
        began, last = time.monotonic(), 0.0
        asyncio.run(run_load(self.workload(max(prompt for prompt, _ in self.options.shapes), 16), 16, 0, concurrency=16))  # not counted
        for (prompt, output), clients, stage in points:
            if ((prompt, output), clients, stage) in done:
                continue
            self.wait_for(stage)
            if self.record["points"] and time.monotonic() - began + 1.5 * last > self.options.budget_s:
                print(f"out of time before {prompt} x {output} with {clients} clients; call again with the same folder", flush=True)
                break
            started = time.monotonic()
            self.record["points"].append(self.point(prompt, output, clients, stage))
            last = time.monotonic() - started
            self.save()

    def wait_for(self, stage: str) -> None:
        """Experts move with steps, and by what they had to do: there is a small load until then."""
        end = time.monotonic() + SETTLE_S
        while stage == STAGES[2] and time.monotonic() < end and not cluster_metrics.read(self.folder.path).is_settled:
            asyncio.run(run_load(self.workload(256, 16), 8, int(time.monotonic()), concurrency=4))

    def point(self, prompt: int, output: int, clients: int, stage: str) -> dict[str, Any]:
        load, seed = self.workload(prompt, output), 10_000 * len(self.record["points"]) + 1
        number = max(clients, min(self.options.requests * clients, FEW_REQUESTS))
        before = cluster_metrics.read(self.folder.path)
        outcomes, seconds = asyncio.run(run_load(load, number, seed, concurrency=clients))
        after = cluster_metrics.read(self.folder.path)
        name = f"{prompt} x {output}, {clients}" + (f", {stage}" if stage else "")
        row = summarise(name, outcomes, seconds, 1e9, 1e9, self.gpus)
        del row["goodput req/s"]
        print(table([row]), flush=True)
        for error in sorted({outcome.error for outcome in outcomes if outcome.error}):
            print(f"failed: {error}", flush=True)
        self.times.append([_compact(outcome) for outcome in outcomes])
        sizes = {role: self.spec.ranks_per_replica(role) for role in ("prefill", "decode")}
        return {
            "shape": [prompt, output], "clients": clients, "stage": stage, "seconds": seconds, "row": row,
            "stages": cluster_metrics.stages_between(before, after),
            "routing": cluster_metrics.routing_between(before, after, sizes),
            "waiting": cluster_metrics.waits_between(before, after, seconds),
            "requests": cluster_metrics.requests_between(before, after),
        }  # fmt: skip

    # -- the record ------------------------------------------------------------------------------------------------------------

    def save(self) -> None:
        self.record |= {
            "command": " ".join(sys.argv[1:]), "commit": commit(), "hardware": devices(), "date": time.strftime("%Y-%m-%d"),
            "file": self.options.file.name, "overrides": self.overrides, "devices": self.gpus,
        }  # fmt: skip
        self.pack_logs()
        self._path("times.json.gz").write_bytes(gzip.compress(json.dumps(self.times, separators=(",", ":")).encode(), 6))
        self._path("json").write_text(json.dumps(self.record, indent=1) + "\n")
        self._path("md").write_text(report(self.record, self.options.routing))
        plot(self._path("png"), self.record, self.options.routing)


def _compact(outcome: Outcome) -> dict[str, Any]:
    """Times in milliseconds: when it began, of the first token, then from token to token."""
    found: dict[str, Any] = {"at": round(1e3 * outcome.started, 1), "in": outcome.input_len, "error": outcome.error}
    if outcome.token_times:
        found |= {"ttft": round(1e3 * outcome.ttft, 1), "itl": [round(1e3 * itl, 1) for itl in outcome.itls]}
    return found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Start a cluster, load it at rising concurrency, take it down.")
    parser.add_argument("--out", type=pathlib.Path, required=True, metavar="FOLDER")
    parser.add_argument("--file", type=pathlib.Path, default=ROOT / "deploy/clusters/h200_flash_1p1d.yaml")
    parser.add_argument("--home", type=pathlib.Path, default=ROOT / ".baton", help="where the cluster keeps its folder")
    parser.add_argument("--routing", choices=["even", "skewed", "scored"], default="even")
    parser.add_argument("--skew", type=float, default=0.6, help="of --routing skewed; as bench_balance")
    parser.add_argument("--around-moves", action="store_true", help="each point before, while and after experts move")
    parser.add_argument("--shapes", type=pairs, default=[(8192, 1024), (4096, 1024)], metavar="INxOUT,...")
    parser.add_argument("--concurrency", type=ints, default=[1, 4, 16, 64, 128, 256])
    parser.add_argument("--requests", type=int, default=2, help="of each client")
    parser.add_argument("--budget-s", type=float, default=540.0, help="for the load")
    parser.add_argument("--keep", action="store_true", help="leave the cluster up")
    parser.add_argument("--tiny", action="store_true", help="the same on CPUs, with a tiny model")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of the cluster file")
    return parser.parse_args()


def main() -> None:
    bench = Bench(parse())
    bench.up()
    try:
        bench.run()
    finally:
        if not bench.options.keep:
            bench.down()
    print(f"written to {bench.out}")


if __name__ == "__main__":
    main()

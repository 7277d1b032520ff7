"""Load a running router and report what its clients see.

    python -m tests.benchmarks.bench_serving --url http://127.0.0.1:8000 --concurrency 1 4 16 --num-requests 48
    python -m tests.benchmarks.bench_serving --rate 2 4 --num-requests 60 --input-len 512 --output-len 64 --out results/x

Closed loop (`--concurrency`): so many clients, each sends its next request when the last one ended. Open loop (`--rate`):
requests start at random times (Poisson) at so many a second whatever the server does, which shows queueing.

Prompts are random token ids, so that no cache helps and the input length is exact; outputs run to `--output-len`
(`ignore_eos`), and are counted by the usage that every event carries. Writes OUT.json (every request's times), OUT.md (the table) and
OUT.png (the plot), and prints the table. The share of time by stage comes from the router's own histograms, read before and after each
run.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import os
import pathlib
import platform
import random
import sys
import time
from collections.abc import AsyncIterator, Sequence

import httpx
import orjson
from prometheus_client.parser import text_string_to_metric_families
from tqdm import tqdm

from tests.benchmarks.command_line import command, commit

STAGE_METRIC = "baton_router_stage_seconds"


@dataclasses.dataclass(slots=True)
class Outcome:
    """One request as its client saw it. Times in seconds since the run began."""

    started: float
    input_len: int
    token_times: list[float] = dataclasses.field(default_factory=list)
    ended: float = 0.0
    error: str = ""

    @property
    def ttft(self) -> float:
        return self.token_times[0] - self.started

    @property
    def itls(self) -> list[float]:
        return [b - a for a, b in zip(self.token_times, self.token_times[1:], strict=False)]

    @property
    def rate(self) -> float:
        """Tokens/s that its user sees after the first; nan of one token."""
        times = self.token_times
        return (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 and times[-1] > times[0] else float("nan")


@dataclasses.dataclass(frozen=True, slots=True)
class Workload:
    url: str
    model: str
    vocab: tuple[int, int]
    """Prompt ids are drawn from this half-open range."""
    input_len: int
    output_len: int
    range_ratio: float
    """Lengths are uniform in [ratio * len, len]; 1 makes them all equal."""
    api_key: str
    timeout_s: float

    def draw_len(self, rng: random.Random, length: int) -> int:
        return rng.randint(max(1, round(self.range_ratio * length)), length)


def authorization(api_key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {api_key}"} if api_key else {}


async def one_request(client: httpx.AsyncClient, load: Workload, seed: int, origin: float) -> Outcome:
    """Stream one completion. Never raises for what the server does: the outcome carries the error."""
    rng = random.Random(seed)
    prompt = [rng.randrange(*load.vocab) for _ in range(load.draw_len(rng, load.input_len))]
    body = {
        "model": load.model,
        "prompt": prompt,
        "max_tokens": load.draw_len(rng, load.output_len),
        "stream": True,
        "ignore_eos": True,
        "temperature": 1.0,
        "seed": seed,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }
    outcome = Outcome(started=time.perf_counter() - origin, input_len=len(prompt))
    try:
        async with client.stream("POST", f"{load.url}/v1/completions", json=body) as response:
            if response.status_code != 200:
                outcome.error = f"HTTP {response.status_code}: {(await response.aread())[:200].decode(errors='replace')}"
                return outcome
            async for num_tokens in tokens_of(response):
                outcome.token_times += [time.perf_counter() - origin] * num_tokens
        if len(outcome.token_times) != body["max_tokens"]:
            outcome.error = f"{len(outcome.token_times)} tokens in place of {body['max_tokens']}"
    except (httpx.HTTPError, json.JSONDecodeError, KeyError) as error:
        outcome.error = f"{type(error).__name__}: {error}"
    outcome.ended = time.perf_counter() - origin
    return outcome


async def tokens_of(response: httpx.Response) -> AsyncIterator[int]:
    """Number of tokens in each event of a completions stream."""
    seen = 0
    async for line in response.aiter_lines():
        if not line.startswith("data: ") or line == "data: [DONE]":
            continue
        event = orjson.loads(line[6:])
        if "error" in event:
            raise KeyError(str(event["error"])[:200])
        total = (event.get("usage") or {}).get("completion_tokens", seen)
        if total > seen:
            yield total - seen
            seen = total


async def run_load(load: Workload, count: int, seed: int, *, concurrency: int = 0, rate: float = 0.0) -> tuple[list[Outcome], float]:
    """Run `count` requests, closed loop (concurrency > 0) or open loop (rate > 0). Returns outcomes and the run's seconds."""
    headers = authorization(load.api_key)
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=concurrency or 256)
    rng = random.Random(seed)
    name = f"{concurrency} clients" if concurrency else f"{rate:g} req/s"
    async with httpx.AsyncClient(timeout=load.timeout_s, headers=headers, limits=limits, trust_env=False) as client:
        origin = time.perf_counter()
        with tqdm(total=count, desc=name, unit="req", file=sys.stderr) as progress:

            async def one(index: int) -> Outcome:
                outcome = await one_request(client, load, seed + index, origin)
                progress.update()
                return outcome

            if concurrency:
                waiting = iter(range(count))

                async def one_client() -> list[Outcome]:
                    return [await one(index) for index in waiting]

                nested = await asyncio.gather(*(one_client() for _ in range(concurrency)))
                outcomes = [outcome for part in nested for outcome in part]
            else:
                tasks = []
                for index in range(count):
                    tasks.append(asyncio.create_task(one(index)))
                    await asyncio.sleep(rng.expovariate(rate))
                outcomes = list(await asyncio.gather(*tasks))
        return outcomes, time.perf_counter() - origin


def read_stages(load: Workload) -> dict[str, float]:
    """Total seconds by stage since the router started."""
    text = httpx.get(f"{load.url}/metrics", trust_env=False).text
    sums: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == f"{STAGE_METRIC}_sum":
                stage = sample.labels["stage"]
                sums[stage] = sums.get(stage, 0.0) + sample.value
    return sums


def percentile(values: Sequence[float], percent: float) -> float:
    """Nearest-rank percentile; nan of nothing."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))] if ordered else float("nan")


def summarise(
    name: str, outcomes: list[Outcome], seconds: float, slo_ttft_s: float, slo_itl_s: float, num_gpus: int = 0
) -> dict[str, float | str]:
    """One row of the table. A request is good when its TTFT and its mean ITL both meet the goals."""
    done = [outcome for outcome in outcomes if not outcome.error]
    ttfts = [outcome.ttft for outcome in done]
    itls = [itl for outcome in done for itl in outcome.itls]
    good = [o for o in done if o.ttft <= slo_ttft_s and (not o.itls or sum(o.itls) / len(o.itls) <= slo_itl_s)]
    row: dict[str, float | str] = {"load": name, "requests": len(outcomes), "failed": len(outcomes) - len(done)}
    row["req/s"] = len(done) / seconds
    row["in tok/s"] = sum(outcome.input_len for outcome in done) / seconds
    row["out tok/s"] = sum(len(outcome.token_times) for outcome in done) / seconds
    rates = [outcome.rate for outcome in done if outcome.rate == outcome.rate]
    row["tok/s/user"] = percentile(rates, 50)
    if num_gpus:
        row["out tok/s/GPU"] = float(row["out tok/s"]) / num_gpus
        row["all tok/s/GPU"] = (float(row["in tok/s"]) + float(row["out tok/s"])) / num_gpus
    for label, values in (("TTFT", ttfts), ("ITL", itls)):
        for percent in (50, 90, 99):
            row[f"{label} p{percent} ms"] = 1000 * percentile(values, percent)
    row["goodput req/s"] = len(good) / seconds
    return row


def table(rows: list[dict[str, float | str]]) -> str:
    keys = list(rows[0])
    cells = [[f"{row[key]:.4g}" if isinstance(row[key], float) else str(row[key]) for key in keys] for row in rows]
    lines = [keys, ["---"] * len(keys), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def stage_table(rows: list[dict[str, float]], names: list[str]) -> str:
    stages = sorted({stage for row in rows for stage in row}, key=lambda s: -sum(row.get(s, 0.0) for row in rows))
    lines = [["load", *stages], ["---"] * (len(stages) + 1)]
    for name, row in zip(names, rows, strict=True):
        total = sum(row.values()) or 1.0
        lines.append([name, *(f"{100 * row.get(stage, 0.0) / total:.1f} %" for stage in stages)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def plot(path: pathlib.Path, rows: list[dict[str, float | str]], runs: list[list[Outcome]], stages: list[dict[str, float]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [str(row["load"]) for row in rows]
    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(15, 4.2), layout="constrained")
    for name, outcomes in zip(names, runs, strict=True):
        done = [outcome for outcome in outcomes if not outcome.error]
        for axes, values in ((left, [o.ttft for o in done]), (middle, [i for o in done for i in o.itls])):
            ordered = sorted(values)
            axes.plot([1000 * v for v in ordered], [100 * (i + 1) / len(ordered) for i in range(len(ordered))], label=name)
    left.set(xlabel="time to first token, ms", ylabel="% of requests", title="TTFT", xscale="log")
    middle.set(xlabel="inter-token latency, ms", ylabel="% of tokens", title="ITL", xscale="log")
    left.legend()
    bottom = [0.0] * len(rows)
    for stage in sorted({stage for row in stages for stage in row}):
        shares = [100 * row.get(stage, 0.0) / (sum(row.values()) or 1.0) for row in stages]
        right.bar(names, shares, bottom=bottom, label=stage)
        bottom = [a + b for a, b in zip(bottom, shares, strict=True)]
    right.set(ylabel="% of request time", title="Where the time goes")
    right.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=110)


def hardware() -> str:
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{os.cpu_count()} cores of {model}, Python {platform.python_version()}"


VOCAB = (300, 1200)
"""Ids that the demo model has."""


def main() -> int:
    parser = argparse.ArgumentParser(description="Load a running router; report TTFT, ITL, goodput and time by stage.")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--concurrency", type=int, nargs="*", default=[], help="closed loop: numbers of clients")
    parser.add_argument("--rate", type=float, nargs="*", default=[], help="open loop: requests a second")
    parser.add_argument("--num-requests", type=int, default=64, help="a run")
    parser.add_argument("--gpus", type=int, default=0, help="of the cluster: adds tokens/s a GPU to the table")
    parser.add_argument("--input-len", type=int, default=256)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--range-ratio", type=float, default=0.8)
    parser.add_argument("--vocab", type=int, nargs=2, default=VOCAB, help="range of prompt token ids (default: %(default)s)")
    parser.add_argument("--slo-ttft-ms", type=float, default=2000.0)
    parser.add_argument("--slo-itl-ms", type=float, default=100.0)
    parser.add_argument("--timeout-s", type=float, default=600.0)
    parser.add_argument("--api-key", default="")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=pathlib.Path, default=None, help="path without ending for .json, .md and .png")
    arguments = parser.parse_args()
    if not arguments.concurrency and not arguments.rate:
        arguments.concurrency = [1, 4, 16]

    models = httpx.get(f"{arguments.url}/v1/models", trust_env=False, headers=authorization(arguments.api_key)).json()
    load = Workload(
        url=arguments.url,
        model=models["data"][0]["id"],
        vocab=(arguments.vocab[0], arguments.vocab[1]),
        input_len=arguments.input_len,
        output_len=arguments.output_len,
        range_ratio=arguments.range_ratio,
        api_key=arguments.api_key,
        timeout_s=arguments.timeout_s,
    )
    asyncio.run(run_load(load, 2, arguments.seed + 10**6, concurrency=1))  # warm-up, not counted
    rows, runs, stage_rows = [], [], []
    plans = [{"concurrency": c} for c in arguments.concurrency] + [{"rate": r} for r in arguments.rate]
    for number, plan in enumerate(plans):
        before = read_stages(load)
        outcomes, seconds = asyncio.run(run_load(load, arguments.num_requests, arguments.seed + 1000 * number, **plan))
        name = f"{plan['concurrency']} clients" if "concurrency" in plan else f"{plan['rate']:g} req/s"
        goals = (arguments.slo_ttft_ms / 1000, arguments.slo_itl_ms / 1000)
        rows.append(summarise(name, outcomes, seconds, *goals, arguments.gpus))
        stage_rows.append({stage: total - before.get(stage, 0.0) for stage, total in read_stages(load).items()})
        runs.append(outcomes)
    text = "\n".join(
        [
            f"Command: `{command()}`  ",
            f"Commit {commit()}, {hardware()}, {time.strftime('%Y-%m-%d')}. Good: TTFT <= {arguments.slo_ttft_ms:g} ms and "
            f"mean ITL <= {arguments.slo_itl_ms:g} ms.",
            "",
            table(rows),
            "",
            "Share of request time by stage (router's histograms):",
            "",
            stage_table(stage_rows, [str(row["load"]) for row in rows]),
        ]
    )
    print(text)
    for outcomes in runs:
        for error in sorted({outcome.error for outcome in outcomes if outcome.error}):
            print(f"failed: {error}", file=sys.stderr)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.with_suffix(".md").write_text(f"# Serving benchmark\n\n{text}\n\n![plot]({arguments.out.name}.png)\n")
        record = {"rows": rows, "stages": stage_rows, "runs": [[dataclasses.asdict(o) for o in run] for run in runs]}
        arguments.out.with_suffix(".json").write_text(json.dumps(record, indent=None))
        plot(arguments.out.with_suffix(".png"), rows, runs, stage_rows)
    return 1 if any(row["failed"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())

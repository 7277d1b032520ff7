"""Time the ops' backends on one GPU: `python -m tests.benchmarks.bench_ops [--ops a,b] [--backends x,y] [--out file.json]`.

Rows come from BENCH of `engine/ops/<op>/cases.py`. Each is timed as the replay of a CUDA graph that runs the op once on each of
several input sets, so many that the L2 cache does not hold them from one replay to the next (column `cold`: no where the row's
data is too small for that). Shares are of the copy bandwidth and matrix rates measured at the start of the same run, with bytes
and FLOPs counted from the shape. `spread` is half the range of the middle 80 % of replays over the median.
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib
import json
import pathlib
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from engine.ops.cases import Bench, prepared
from engine.ops.names import OP_NAMES
from engine.ops.registry import get_op
from tests.benchmarks.command_line import commit

NUM_REPLAYS = 21
COLD_BYTES = 400 * 2**20
"""Several times the L2 of any GPU at hand."""
MAX_SETS = 64
MAX_BYTES = 40 * 2**30


def time_graph(calls: Sequence[Callable[[], object]], min_replay_ms: float = 0.3) -> tuple[float, float]:
    """(median, spread) of one call in us: all calls in one graph, replayed."""
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()  # the inputs are drawn
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    graph.replay()
    times: list[float] = []
    repeats = 1
    while len(times) < NUM_REPLAYS:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(repeats):
            graph.replay()
        end.record()
        end.synchronize()
        elapsed = start.elapsed_time(end)
        if elapsed < min_replay_ms and not times:
            repeats = 2 * repeats
            continue
        times.append(elapsed * 1e3 / repeats / len(calls))
    times.sort()
    median = statistics.median(times)
    return median, (times[int(0.9 * len(times))] - times[int(0.1 * len(times))]) / 2 / median


def ceilings(device: torch.device) -> dict[str, float]:
    """Copy bandwidth in bytes/s (read + written; an elementwise kernel, since a copy in a graph may run on the slower copy engine) and
    matrix rates in FLOP/s, on random values."""
    source = torch.randint(0, 2**60, (2**29,), device=device)
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / time_graph([functools.partial(torch.bitwise_not, source, out=target)])[0] * 1e6
    del source, target
    torch.cuda.empty_cache()
    size = 8192
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    bf16 = 2 * size**3 / time_graph([lambda: a @ b])[0] * 1e6
    a8, b8, one = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).T.contiguous().T, torch.ones((), device=device)
    fp8 = 2 * size**3 / time_graph([lambda: torch._scaled_mm(a8, b8, one, one, out_dtype=torch.bfloat16)])[0] * 1e6
    return {"copy": copy, "bf16": bf16, "fp8": fp8}


def num_sets(bench: Bench) -> int:
    return max(1, min(MAX_SETS, COLD_BYTES // max(bench.num_bytes, 1) + 1, MAX_BYTES // max(bench.num_bytes, 1)))


def calls_of(op_name: str, backend: str, bench: Bench, device: torch.device) -> list[Callable[[], object]]:
    op = get_op(op_name)
    calls: list[Callable[[], object]] = []
    for index in range(num_sets(bench)):
        run, args = prepared(op, backend, bench.draw(device, 1000 * index + 1))
        calls.append(lambda run=run, args=args: run(*args))
    return calls


def measure(bench: Bench, calls: Sequence[Callable[[], object]], limits: dict[str, float]) -> dict[str, Any]:
    median, spread = time_graph(calls)
    row = {"us": median, "spread": spread, "bytes": bench.num_bytes, "flops": bench.num_flops, "num_sets": len(calls)}
    row["cold"] = len(calls) * bench.num_bytes >= COLD_BYTES
    row["share_of_copy"] = bench.num_bytes / (median * 1e-6) / limits["copy"]
    if bench.rate:
        row["rate"], row["share_of_rate"] = bench.rate, bench.num_flops / (median * 1e-6) / limits[bench.rate]
    return row


def rows_of(op_name: str, device: torch.device, limits: dict[str, float], backends: Sequence[str], shape: str) -> Iterator[dict[str, Any]]:
    op = get_op(op_name)
    for bench in importlib.import_module(f"engine.ops.{op_name}.cases").BENCH:
        if shape not in bench.name:
            continue
        bodies: dict[str, Callable[[], list[Callable[[], object]]]] = {}
        for backend, impl in op.backends.items():
            if impl.requires(device) is None and (not backends or backend in backends):
                bodies[backend] = lambda backend=backend, bench=bench: calls_of(op_name, backend, bench, device)
        for name, make in bench.baselines.items():
            bodies[name] = lambda make=make, bench=bench: [make(device, 1000 * index + 1) for index in range(num_sets(bench))]
        for name, body in bodies.items():
            row = {"op": op_name, "shape": bench.name, "backend": name, **measure(bench, body(), limits)}
            print(line(row), flush=True)
            yield row
            gc.collect()
            torch.cuda.empty_cache()


def line(row: dict[str, Any]) -> str:
    rate = f"{row['share_of_rate']:6.0%} {row['rate']}" if "rate" in row else ""
    cold = "yes" if row["cold"] else "no"
    start = f"{row['op']:<16} {row['shape']:<34} {row['backend']:<18} {row['us']:>9.2f} us {row['spread']:>6.1%}"
    return f"{start} {row['bytes'] / 1e6:>9.2f} MB {row['share_of_copy']:>6.0%} {cold:<4} {rate}".rstrip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", default="", help="op names, separated by commas; default: all with backends")
    parser.add_argument("--backends", default="", help="only these backends (baselines are always timed)")
    parser.add_argument("--shape", default="", help="only rows whose shape has this text in it")
    parser.add_argument("--out", type=pathlib.Path, help="JSON file to write")
    args = parser.parse_args()
    names = [name for name in args.ops.split(",") if name] or [name for name in OP_NAMES if get_op(name).backends]
    device = torch.device("cuda")
    limits = ceilings(device)
    gpu = torch.cuda.get_device_name(device)
    print(f"{gpu}, torch {torch.__version__}, commit {commit()}")
    print(f"copy {limits['copy'] / 1e12:.2f} TB/s, bf16 {limits['bf16'] / 1e12:.0f} TFLOP/s, fp8 {limits['fp8'] / 1e12:.0f} TFLOP/s")
    print(f"{'op':<16} {'shape':<34} {'backend':<18} {'median':>12} {'spread':>6} {'bytes':>12} {'copy':>6} {'cold':<4} rate")
    rows, header = [], {"gpu": gpu, "torch": torch.__version__, "commit": commit(), "ceilings": limits}
    for name in names:
        for row in rows_of(name, device, limits, [backend for backend in args.backends.split(",") if backend], args.shape):
            rows.append(row)
            if args.out:  # after each row: a run that is cut short leaves what it has
                args.out.write_text(json.dumps({**header, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

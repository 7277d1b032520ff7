"""The pages of `bench_cluster`: tables and the plot of output tokens/s a GPU against tokens/s a user."""

from __future__ import annotations

import pathlib
import platform
import shutil
import subprocess
from typing import Any

from tests.benchmarks.bench_serving import hardware, stage_table, table


def devices() -> str:
    """The machine in words."""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return hardware()
    found = subprocess.run([smi, "--query-gpu=name,driver_version", "--format=csv,noheader"], capture_output=True, text=True, check=False)
    names = found.stdout.strip().splitlines()
    return f"{len(names)} x {names[0] if names else 'no GPU'}, {hardware()}, {platform.release()}"


def report(record: dict[str, Any], routing: str) -> str:
    points = record["points"]
    lines = [
        f"# {record['file']}, routing {routing}",
        "",
        f"    python -m tests.benchmarks.bench_cluster {record['command']}",
        "",
        f"Commit {record['commit']}, {record['hardware']}, {record['date']}; {record['devices']} ranks, started in {record['start s']} s. "
        "Load: prompt x output tokens, clients. Rates are over the whole run, ramps included; a user's is the median over requests.",
        "",
        table([point["row"] for point in points]),
        "",
        'How evenly experts were used, mean over layers (largest); "at first" is where each rank holds the experts that it started with, '
        '"as placed" are all tokens so far where the experts are now. And the largest share of time that a rank waited for its peers '
        "between steps, and the requests of the rank that had most:",
        "",
        "| load | role | busiest expert / mean | busiest rank / mean, at first | as placed | moved so far | experts used | waiting | "
        "most requests / mean |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for point in points:
        for role, found in point["routing"].items():
            waiting = max(share for rank, share in point["waiting"].items() if rank.startswith(role))
            most = {name: max(one[name] for one in found["layers"].values()) for name in ("busiest expert", "busiest rank", "as placed")}
            shares = " | ".join(f"{found[name]:.3f} ({value:.3f})" for name, value in most.items())
            requests = [number for rank, number in point["requests"].items() if rank.startswith(role)]
            most = max(requests) * len(requests) / max(sum(requests), 1)
            shares += f" | {found['moves']:g} | {found['used']:.1%} | {waiting:.1%} | {most:.2f}"
            lines.append(f"| {point['row']['load']} | {role} | {shares} |")
    lines += ["", "Share of request time by stage (routers' histograms):", ""]
    lines += [stage_table([point["stages"] for point in points], [point["row"]["load"] for point in points])]
    return "\n".join([*lines, "", f"![output tokens/s a GPU against tokens/s a user]({routing}.png)", ""])


def plot(path: pathlib.Path, record: dict[str, Any], routing: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    shapes = list(dict.fromkeys(tuple(point["shape"]) for point in record["points"]))
    for shape in shapes:
        points = [point for point in record["points"] if tuple(point["shape"]) == shape]
        rates = [(point["row"]["tok/s/user"], point["row"]["out tok/s/GPU"]) for point in points]
        axes.plot(*zip(*rates, strict=True), marker="o", label=f"{shape[0]} in, {shape[1]} out")
        for point, rate in zip(points, rates, strict=True):
            axes.annotate(str(point["clients"]), rate, textcoords="offset points", xytext=(5, 4), fontsize=8)
    axes.set(xlabel="tokens/s a user", ylabel="output tokens/s a GPU", title=f"{record['file']}, routing {routing}; numbers are clients")
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)

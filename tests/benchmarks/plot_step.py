"""Where the time of decode steps goes, as stacked bars: `python -m tests.benchmarks.plot_step RESULT.json OUT.png --shapes 1x8192,32x8192`.

Reads the profiles in a result of `bench_engine --profile`. Kernels of side streams overlap, so a bar of their sum is longer than the
step; each is scaled to the step's measured time.
"""

from __future__ import annotations

import argparse
import collections
import json
import pathlib

PARTS = (
    ("experts", ("moe_hidden", "moe_out", "moe_sum", "moe_route", "moe_many", "moe_widen", "moe_act")),
    ("FP8 projections (of one row: all)", ("fp8_linear", "fp8_gemm", "act_quant", "swiglu", "vector_kernel")),
    ("grouped output", ("grouped_linear", "direct_copy", "128, 4, at::native::gpu_kernel_impl_nocast<at::native::Bin")),
    ("plain projections, head", ("nvjet", "splitKreduce", "linear_few")),
    ("attention", ("flash_", "get_mla_metadata", "attn_", "derotate")),
    ("hyper-connections", ("one_launch", "project_kernel", "finish_kernel", "hc_")),
    ("exchange", ("nccl", "direct_", "exchange_")),
    (
        "norms, stores, compressors, index, router",
        ("norm", "kv_store", "compress", "index_query", "index_topk", "decode_logits", "moe_gate"),
    ),
    ("gaps", ("idle",)),
)
REST = "copies, indices, sums (torch)"


def part_of(kernel: str) -> str:
    return next((name for name, words in PARTS if any(word in kernel for word in words)), REST)


def main() -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    parser = argparse.ArgumentParser(description="Stacked bars of decode steps by part.")
    parser.add_argument("result", type=pathlib.Path)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--shapes", default="1x8192,32x8192,128x8192", help="BATCHxCONTEXT,...")
    arguments = parser.parse_args()
    report = json.loads(arguments.result.read_text())
    rows = {f"{row['batch']}x{row['context']}": row for row in report["decode"]}
    figure, axes = pyplot.subplots(figsize=(9, 4.5))
    names = [name for name, _ in PARTS] + [REST]
    bottoms = [0.0] * len(arguments.shapes.split(","))
    bars = []
    for shape in arguments.shapes.split(","):
        spent: collections.Counter[str] = collections.Counter()
        for kernel, us in rows[shape]["profile us"].items():
            spent[part_of(kernel)] += us
        scale = rows[shape]["ms"] / sum(spent.values())
        bars.append({name: spent[name] * scale for name in names})
    steps = [rows[shape] for shape in arguments.shapes.split(",")]
    labels = [f"{step['batch']} x {step['context']:,}\n{step['ms']:.1f} ms" for step in steps]
    for index, name in enumerate(names):
        values = [bar[name] for bar in bars]
        axes.barh(labels, values, left=bottoms, label=name, color=pyplot.get_cmap("tab10")(index))
        bottoms = [left + value for left, value in zip(bottoms, values, strict=True)]
    axes.invert_yaxis()
    host = f"{report['layers']} layers on {report['ranks']} x {report['device']}"
    axes.set_xlabel(f"ms of a decode step; {host}, sequences a GPU x tokens of context")
    axes.legend(fontsize=7, loc="upper right")
    figure.tight_layout()
    figure.savefig(arguments.out, dpi=130)


if __name__ == "__main__":
    main()

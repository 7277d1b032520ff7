"""Time whole steps of a model of published shape with dummy weights, on one GPU or on a group of them.

python -m tests.benchmarks.bench_engine [--model deploy/model_shapes/v4_flash] [--layers N] [--ranks 2] [--batches 1,8,32]
    [--contexts 4096,8192] [--prompts 8192] [--chunk 8192] [--attention-tp 2] [--routing even] [--widened-layers N] [--profile]
    [--out file.json]

`--layers` keeps the first so many layers, for devices that do not hold all. A decode step is one replay of its graph, sampling aside;
`batch` is per rank, or of `--attention-tp` ranks together. A prefill is the chunks of one prompt, or of as many as fill one chunk. With
`--routing even` experts are chosen by token id in all layers, each as likely; with `scored`, as the published config.json has it, dummy
hidden states are alike and a few experts get all tokens. Each row stands beside the floor of the same run: the bytes that the step must
move (weights once, of experts those that its tokens touch, each sequence's cache rows) over the copy bandwidth, or its FLOPs over the
matrix rate, measured at the start.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import tempfile
from collections.abc import Iterator
from typing import Any

import torch

from core.request import Request, SamplingParams
from engine.batch import Chunk, build_batch
from engine.cache.arena import ModelCaches
from engine.config import EngineConfig, ModelConfig
from engine.engine import LoadedModel
from engine.graphs import PAGES_STEP, DecodeGraphs
from engine.memory_plan import tensor_bytes
from engine.parallel.experts import Sharing
from engine.parallel.group import Group, Limits, Rendezvous, Seat
from engine.sequence import Sequence
from engine.widening import widen_outputs
from tests.benchmarks.bench_ops import ceilings
from tests.benchmarks.command_line import command, commit, ints, pairs
from tests.benchmarks.step_profile import profile_step

NUM_REPLAYS = 20
FILLED_TOKENS = 512
"""Of the prompt that fills the caches, in one step, for which an exchange needs room."""


def cut_shape(folder: pathlib.Path, layers: int | None, into: pathlib.Path, is_even: bool = True) -> pathlib.Path:
    """A folder with the shape of `folder`, of the first `layers` layers. `is_even`: experts go by token id in all of them."""
    config = json.loads((folder / "config.json").read_text())
    if layers is not None:
        config["num_hidden_layers"], config["compress_ratios"] = layers, [*config["compress_ratios"][:layers], 0]
    config["num_nextn_predict_layers"] = 0
    if is_even:
        config["num_hash_layers"] = config["num_hidden_layers"]
    target = into / folder.name
    target.mkdir()
    (target / "config.json").write_text(json.dumps(config))
    return target


def new_sequence(number: int, length: int, page_ids: list[int]) -> Sequence:
    """One that has `length` tokens in its cache and one to be run."""
    ids = tuple((number * 7919 + place * 31 + 11) % 1999 for place in range(length + 1))  # published vocabularies are larger
    sequence = Sequence.from_request(Request(request_id=str(number), token_ids=ids, prompt_len=1, sampling=SamplingParams(max_tokens=1)))
    sequence.slot_id, sequence.page_ids, sequence.num_computed = number, page_ids, length
    return sequence


def fill(loaded: LoadedModel, caches: ModelCaches) -> None:
    """Every page and slot holds what a prompt of FILLED_TOKENS leaves there."""
    caches.clear_slot(0)
    sequence = new_sequence(0, FILLED_TOKENS - 1, [0, 1])
    sequence.num_computed = 0
    loaded.network.forward(build_batch([Chunk(sequence, FILLED_TOKENS)], loaded.device), caches)
    caches.arena.pages[2:] = caches.arena.pages[1]
    caches.arena.slots[1:] = caches.arena.slots[0]


def touched_experts(loaded: LoadedModel, group: Group | None, graph: torch.cuda.CUDAGraph, batch: int) -> float:
    """Experts that a step of this rank reads, summed over layers: counted in a group, else expected of tokens that choose at random."""
    model, share = loaded.model, loaded.share
    if share is None or group is None:
        missed = (1 - model.num_experts_per_tok / model.n_routed_experts) ** batch
        return model.num_hidden_layers * model.n_routed_experts * (1 - missed)
    before = share.load()
    graph.replay()
    torch.cuda.synchronize()
    tokens = share.load() - before
    group.backend(torch.device("cpu")).allreduce([tokens]).wait()
    held = [layer.held for layer in share.layers.values()]
    return float(sum(int((row[list(experts)] > 0).sum()) for row, experts in zip(tokens, held, strict=True)))


def step_bytes(loaded: LoadedModel, num_experts: float, ranks: int, batch: int, context: int) -> dict[str, int]:
    """Bytes that one rank must read in a decode step: {"experts", "other weights", "cache"}."""
    model, layout = loaded.model, loaded.layout
    one_expert = 3 * model.hidden_size * model.moe_intermediate_size * (0.5 + 1 / 32)
    held = model.num_hidden_layers * model.n_routed_experts // ranks
    embedding = model.vocab_size * model.hidden_size * 2
    rows = {field.name.split(".")[0]: field.row_bytes for field in (*layout.page_fields, *layout.slot_fields)}
    cache = model.num_hidden_layers * min(context, 128) * rows["window"]
    cache += model.compress_ratios.count(4) * (min(model.index_topk, context // 4) * rows["c4_kv"] + context // 4 * rows["index"])
    cache += model.compress_ratios.count(128) * (context // 128) * rows["c128_kv"]
    return {
        "experts": round(num_experts * one_expert),
        "other weights": round(tensor_bytes(loaded.network) - loaded.network.wide_outputs.kept_bytes - held * one_expert - embedding),
        "cache": batch * cache,
    }


def bench_decode(
    loaded: LoadedModel, shapes: list[tuple[int, int]], group: Group | None, bandwidth: float, profile: bool
) -> Iterator[dict[str, Any]]:
    """`shapes`: (batch, context)."""
    free = int(torch.cuda.mem_get_info()[0] * 0.85)
    num_slots = max(batch for batch, _ in shapes)
    wanted = max(batch * (context // 256 + 1) for batch, context in shapes)
    num_pages = min(wanted, max(64, (free - num_slots * loaded.layout.slot_bytes) // loaded.layout.page_bytes // 2))
    caches = loaded.new_caches(num_pages, num_slots)
    fill(loaded, caches)
    for batch, context in shapes:
        width = -(-(context // 256 + 1) // PAGES_STEP) * PAGES_STEP
        graphs = DecodeGraphs(loaded.network, caches, [batch], [width])
        pages = context // 256 + 1
        sequences = [new_sequence(n, context, [(n * pages + i) % num_pages for i in range(pages)]) for n in range(batch)]
        for sequence in sequences:
            mine = 0 if group is None else group.rank - (0 if loaded.heads is None else loaded.heads.rank)
            sequence.token_ids[-1] += batch * mine  # other tokens on every rank that has its own, which other experts see
        graph, logits = graphs.fill([Chunk(sequence, 1) for sequence in sequences])
        times = time_replays(graph)
        assert bool(logits.isfinite().all()), "logits are not finite"
        num_experts = touched_experts(loaded, group, graph, batch)
        parts = step_bytes(loaded, num_experts, group.size if group else 1, batch, context)
        median = statistics.median(times)
        floor = sum(parts.values()) / bandwidth * 1e3
        row = {
            "batch": batch, "context": context, "ms": round(median, 3), "spread": round((times[-2] - times[1]) / 2 / median, 3),
            "tokens/s": round(batch * 1e3 / median, 1), "experts": num_experts,
            "floor ms": round(floor, 3), "share": round(floor / median, 3), "bytes": parts,
        }  # fmt: skip
        if profile:
            row["profile us"] = profile_step(graph, group.barrier if group else lambda: None)
        del graphs, graph, logits
        yield row


def time_replays(graph: torch.cuda.CUDAGraph) -> list[float]:
    """Milliseconds, ascending."""
    times = []
    for _ in range(NUM_REPLAYS + 3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times[3:])


def prefill_flops(model: ModelConfig, tokens: int) -> float:
    """2 per multiply-add, of one prompt without the head (engine/model/deepseek_v4.md, 5)."""
    d, heads, width = model.hidden_size, model.num_attention_heads, model.head_dim
    linear = d * model.q_lora_rank + model.q_lora_rank * heads * width + d * width
    linear += heads * width * model.o_lora_rank + model.o_groups * model.o_lora_rank * d
    linear += (model.num_experts_per_tok + model.n_shared_experts) * 3 * d * model.moe_intermediate_size
    linear += d * model.n_routed_experts + 2 * (2 + model.hc_mult) * model.hc_mult * model.hc_mult * d
    total = 2.0 * tokens * model.num_hidden_layers * linear
    for ratio in model.compress_ratios:
        rows = tokens * min(128, tokens)
        if ratio == 4:
            rows += sum(min(model.index_topk, t // 4) for t in range(tokens))
            total += (
                2.0
                * tokens
                * (4 * d * width + 4 * d * model.index_head_dim + model.q_lora_rank * model.index_n_heads * model.index_head_dim)
            )
            total += 2.0 * model.index_n_heads * model.index_head_dim * tokens * tokens / 8
        elif ratio == 128:
            rows += tokens * tokens // 256
            total += 2.0 * tokens * 2 * d * width
        total += 4.0 * heads * width * rows
    return total


def of_ranks(group: Group | None, mine: float) -> list[float]:
    """Everybody's number."""
    return [mine] if group is None else [float(number) for number in group.gather_bytes("numbers", str(mine).encode())]


def bench_prefill(
    loaded: LoadedModel, prompts: list[int], chunk: int, group: Group | None, rate: float, profile: bool
) -> Iterator[dict[str, Any]]:
    """As many prompts at a time as fill a chunk, at least one."""
    numbers = {prompt: max(1, chunk // prompt) for prompt in prompts}
    caches = loaded.new_caches(max(number * -(-prompt // 256) for prompt, number in numbers.items()), max(2, *numbers.values()))
    for prompt, number in numbers.items():
        pages = -(-prompt // 256)
        sequences = [new_sequence(n, prompt - 1, list(range(n * pages, (n + 1) * pages))) for n in range(number)]
        times = []

        def run(sequences: list[Sequence] = sequences, prompt: int = prompt) -> None:
            for sequence in sequences:
                caches.clear_slot(sequence.slot_id)
            for start in range(0, prompt, chunk):
                length = min(chunk, prompt - start)
                for sequence in sequences:
                    sequence.num_computed = start
                if loaded.share is not None:
                    rows = len(sequences) * length  # all ranks take the same chunks
                    loaded.share.begin_step(rows if loaded.heads is None else loaded.heads.rows_each(rows))
                loaded.network.forward(build_batch([Chunk(sequence, length) for sequence in sequences], loaded.device), caches)

        for _ in range(6 if prompt <= chunk else 3):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            start.record()
            run()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        median = statistics.median(times[1:])
        flops = number * prefill_flops(loaded.model, prompt) / (1 if loaded.heads is None else loaded.heads.size)
        row: dict[str, Any] = {
            "prompt": prompt, "prompts": number, "chunk": chunk, "ms": round(median, 1),
            "all ms": [round(time, 1) for time in times],
            "tokens/s": round(number * prompt * 1e3 / median),
            "TFLOP/s": round(flops / median / 1e9, 1), "share of the fp8 rate": round(flops / rate * 1e3 / median, 3),
        }  # fmt: skip
        if profile and prompt <= chunk:  # the profiler takes minutes for the launches of many chunks
            spent = row["profile us"] = profile_step(run, group.barrier if group else lambda: None)
            busy = sum(us for name, us in spent.items() if name != "idle" and "nccl" not in name)
            row["kernels but NCCL's, by rank, ms"] = of_ranks(group, round(busy / 1e3, 1))
        yield row


def work(rank: int, arguments: argparse.Namespace, rendezvous: str) -> None:
    torch.cuda.set_device(rank)
    limits = ceilings(torch.device("cuda"))
    bandwidth, rate = limits["copy"], limits["fp8"]
    torch.cuda.empty_cache()
    sharing = group = None
    if arguments.ranks > 1:
        seat = Seat(rank=rank, size=arguments.ranks, name="bench/0", host="127.0.0.1", rendezvous=rendezvous)
        group = Group.join(seat, Limits(start_s=300, step_s=90))
        most = max([FILLED_TOKENS, *arguments.batches, *(batch for batch, _ in arguments.also)])
        sharing = Sharing(group=group, max_tokens=most, is_latency_bound=not arguments.prompts, attention_tp=arguments.attention_tp)
    engine = EngineConfig(device="cuda", load="dummy", max_model_len=1 << 20, ops=dict(pair.split("=") for pair in arguments.ops))
    with tempfile.TemporaryDirectory() as folder:
        shape = cut_shape(arguments.model, arguments.layers, pathlib.Path(folder), arguments.routing == "even")
        loaded = LoadedModel.load(shape, engine, sharing)
    loaded.network.widen(arguments.widened_layers)
    report: dict[str, Any] = {
        "command": command(), "commit": commit(), "device": torch.cuda.get_device_name(), "ranks": arguments.ranks,
        "attention_tp": arguments.attention_tp, "routing": arguments.routing,
        "layers": loaded.model.num_hidden_layers, "widened layers": loaded.network.num_widened,
        "copy bandwidth TB/s": round(bandwidth / 1e12, 3), "fp8 rate TFLOP/s": round(rate / 1e12, 1),
        "fp8 rate by rank": of_ranks(group, round(rate / 1e12, 1)),
        "weights GB": round(tensor_bytes(loaded.network) / 1e9, 2), "ops": {choice.op: choice.backend for choice in loaded.ops.choices},
        "decode": [], "prefill": [],
    }  # fmt: skip

    def save() -> None:
        if arguments.out is not None:
            arguments.out.write_text(json.dumps(report, indent=1) + "\n")

    if arguments.prompts:
        for row in bench_prefill(loaded, arguments.prompts, arguments.chunk, group, rate, arguments.profile):
            report["prefill"].append(row)
            if rank == 0:
                show(row)
                save()
    shapes = [(batch, context) for context in arguments.contexts for batch in arguments.batches] + arguments.also
    if shapes:
        most = max(batch for batch, _ in shapes)
        widen_outputs(loaded, most, num_pages=0, num_slots=most, workspace_bytes=0)  # as a rank does
        report["wo_a kept in bf16 GB"] = round(loaded.network.wide_outputs.kept_bytes / 1e9, 2)
        for row in bench_decode(loaded, shapes, group, bandwidth, arguments.profile):
            report["decode"].append(row)
            if rank == 0:
                show(row)
                save()


def show(row: dict[str, Any]) -> None:
    print({key: value for key, value in row.items() if key != "profile us"}, flush=True)
    for name, spent in list(row.get("profile us", {}).items())[:16]:
        print(f"    {spent:10.1f} us  {name}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time steps of a model with dummy weights.")
    parser.add_argument("--model", type=pathlib.Path, default=pathlib.Path("deploy/model_shapes/v4_flash"))
    parser.add_argument("--layers", type=int, default=None)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--attention-tp", type=int, default=1, help="so many ranks compute the same sequences (decode.attention_tp)")
    parser.add_argument("--batches", type=ints, default=[])
    parser.add_argument("--contexts", type=ints, default=[8192])
    parser.add_argument("--also", type=pairs, default=[], metavar="BATCHxCONTEXT,...", help="further decode steps")
    parser.add_argument("--prompts", type=ints, default=[])
    parser.add_argument("--chunk", type=int, default=8192)
    parser.add_argument("--routing", choices=["even", "scored"], default="even")
    parser.add_argument("--ops", nargs="*", default=[], metavar="OP=BACKEND")
    parser.add_argument("--widened-layers", type=int, default=0, help="with experts as FP8 in place of MXFP4 (prefill.widened_layers)")
    parser.add_argument("--profile", action="store_true", help="time by kernel")
    parser.add_argument("--out", type=pathlib.Path, default=None)
    arguments = parser.parse_args()
    if arguments.ranks % arguments.attention_tp:
        parser.error(f"--attention-tp {arguments.attention_tp} does not divide --ranks {arguments.ranks}")
    if arguments.ranks == 1:
        work(0, arguments, "")
        return
    rendezvous = Rendezvous("127.0.0.1")
    torch.multiprocessing.spawn(work, (arguments, rendezvous.address), nprocs=arguments.ranks)


if __name__ == "__main__":
    main()

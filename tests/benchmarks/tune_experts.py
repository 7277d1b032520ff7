"""Routed experts by rows an expert, one row of results for each way to compute them: where the thresholds of moe_experts/triton.py and
deep_gemm.py come from. One GPU.

    python -m tests.benchmarks.tune_experts --out tuned.json

Times in us of the whole op, medians of replays of a CUDA graph; routing is random, and weights are more than the cache holds. `16`, `32`:
Triton's kernels for few rows, with blocks of so many slots; `Hopper 64`, `Hopper 128`: hopper.cu's; `many`: blocks of 128 with DeepGEMM's
product, of weights widened in the call; `FP8 ...`: of weights that were widened before. A last table has rows in rooms, as DeepEP leaves
them in large groups.
"""

from __future__ import annotations

import argparse
import json
import pathlib
from collections.abc import Callable

import torch

from engine.ops.fp8_linear import quantize_rows
from engine.ops.moe_experts import Rooms, deep_gemm, triton
from engine.ops.moe_experts.few import Few, run_rooms
from engine.ops.moe_experts.hopper import Hopper
from engine.ops.moe_experts.tiles import MOST_SPLIT_TILES, PackedExperts, Tiles
from tests.benchmarks.bench_ops import time_graph
from tests.benchmarks.command_line import command, commit

TOP_K, LIMIT = 4, 10.0
CALLS = 3
ROWS = (16, 20, 24, 28, 32, 40, 48, 56, 64, 72, 80, 96, 128, 144, 192, 256, 384)
IN_ROOMS = ((16, 16), (16, 32), (16, 48), (16, 96), (6, 32), (6, 64))
"""Experts, and rows an expert; 16 of V4-Flash's shape, 6 of V4-Pro's."""
FLASH, PRO = (4096, 2048), (7168, 3072)
"""d, I."""
FEW = {"16": triton.BLOCKS_OF_16, "32": triton.BLOCKS_OF_32}
HOPPER = {"Hopper 64": Hopper(64), "Hopper 128": Hopper(128)}


def drawn(experts: int, width: int, inner: int) -> PackedExperts:
    def tiles(height: int, depth: int, places: int) -> Tiles:
        shape = experts, height // 128, depth // 128, places
        codes = torch.randint(0, 256, (*shape, 8192), dtype=torch.uint8, device="cuda")
        exponents = torch.randint(5, 9, (4, *shape, 128), dtype=torch.int32, device="cuda")
        words = sum((exponents[group] << 4 * group for group in range(4)), torch.full_like(exponents[0], 117 << 16))
        return Tiles(codes, words, *shape[1:])

    counters = torch.zeros(MOST_SPLIT_TILES + 1, dtype=torch.int32, device="cuda")
    return PackedExperts(tiles(inner, width, 2), tiles(width, inner, 1), True, width, counters, True)


def timed(call: Callable[[], object]) -> float:
    return round(time_graph([call] * CALLS)[0], 1)


def of_batch(packed: PackedExperts, widened: PackedExperts, rows: int) -> dict[str, float]:
    experts, tokens = packed.num_experts, rows * packed.num_experts // TOP_K
    ids = torch.rand(tokens, experts, device="cuda").topk(TOP_K, dim=1).indices
    x, weights = quantize_rows(torch.randn(tokens, packed.width, device="cuda").bfloat16()), torch.full(ids.shape, 0.25, device="cuda")

    def run(which: PackedExperts, config: Few | Hopper | triton.Many) -> float:
        product = deep_gemm.multiply if isinstance(config, triton.Many) else None
        return timed(lambda: triton.run_with(x, ids, weights, which, LIMIT, torch.float32, config, product))

    many = triton.Many(block_m=128)
    ours = {name: run(packed, config) for name, config in (FEW | HOPPER | {"many": many}).items()}
    return ours | {f"FP8 {name}": run(widened, config) for name, config in (FEW | {"many": many}).items()}


def in_rooms(packed: PackedExperts, rows: int) -> dict[str, float]:
    experts, width, room = packed.num_experts, packed.width, 1024
    number = experts * rows
    counts = torch.bincount(torch.randint(0, experts, (number,), device="cuda"), minlength=experts).int()
    quantized = quantize_rows(torch.randn(experts * room, width, dtype=torch.bfloat16, device="cuda"))
    codes = quantized.codes.contiguous().view(experts, room, width)
    scale = quantized.scale.unflatten(0, (experts, room)).transpose(1, 2).contiguous().transpose(1, 2)
    out = torch.empty(experts, room, width, dtype=torch.bfloat16, device="cuda")
    x = Rooms(codes, scale, counts, 16 * number, number, out)
    return {name: timed(lambda config=config: run_rooms(x, packed, LIMIT, config)) for name, config in (FEW | HOPPER).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Time routed experts by rows an expert, in every way there is.")
    parser.add_argument("--out", type=pathlib.Path, default=None)
    out = parser.parse_args().out
    torch.manual_seed(1)
    device = torch.cuda.get_device_name()
    found = {"command": command(), "commit": commit(), "gpu": device, "torch": torch.__version__, "batch": [], "rooms": []}
    packed = drawn(64, *FLASH)
    widened = triton.widen(packed)
    for rows in ROWS:
        found["batch"].append({"experts": 64, "rows": rows, "us": of_batch(packed, widened, rows)})
        print(found["batch"][-1], flush=True)
    del widened
    for experts, rows in IN_ROOMS:
        packed = drawn(experts, *(FLASH if experts == 16 else PRO))
        found["rooms"].append({"experts": experts, "rows": rows, "us": in_rooms(packed, rows)})
        print(found["rooms"][-1], flush=True)
    if out is not None:
        out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()

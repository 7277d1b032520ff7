"""Ratio-128 compression at V4 shapes: decode at every kind of place, chunks of several prompts that begin and end inside blocks."""

from __future__ import annotations

import torch

from engine.model.rope import rotation
from engine.ops.cases import Bench, Case, Draw, randn
from engine.ops.compress_c4.cases import EPS, FP32, REASON, Chunks, check_of, form_of, frequencies
from engine.ops.paged_cases import empty_pool, places_of


def _draw(chunks: Chunks, kind: str, dtype: torch.dtype, fillers: int = 0, before: int = 0) -> Draw:
    def draw(device: torch.device, seed: int) -> tuple[object, ...]:
        form, _, rope = form_of(kind)
        dim = form.width
        places, num_pages, num_slots = places_of(device, seed, chunks, fillers)
        tokens = len(places.positions_T)
        state = randn(device, seed + 1, num_slots, 3, dim)
        state[:, 1] = state[:, 1].abs() + 1  # a sum of exponentials, one of them 1
        projected = randn(device, seed + 2, tokens, before + 2 * dim)[:, before:]
        ape = randn(device, seed + 3, 128, dim)
        weight = (randn(device, seed + 4, dim, scale=0.1) + 1).to(torch.bfloat16)
        cos, sin = rotation(places.positions_T // 128 * 128, frequencies(rope).to(device))
        return projected, ape, state, places, weight, cos, sin, EPS, dtype, empty_pool(device, form, max(num_pages, 1), 2)

    return draw


def _case(
    name: str,
    chunks: Chunks,
    kind: str,
    bound: float,
    dtype: torch.dtype = torch.bfloat16,
    small: bool = False,
    fillers: int = 0,
    before: int = 0,
) -> Case:
    """`before`: columns of something else, before those of the compressor."""
    check = check_of(form_of(kind)[0], bound)
    return Case(name, _draw(chunks, kind, dtype, fillers, before), bound, REASON, small, written=(2, 9), check=check)


DECODE = [(position, 1) for position in (0, 1, 126, 127, 128, 254, 255, 256, 383, 70_015)]
MANY = [(0, 3), (0, 128), (0, 300), (1, 127), (127, 1), (127, 2), (100, 20), (120, 800), (383, 1), (4095, 130)]
CASES = (
    _case("no tokens", [], "fp8", 0.0, small=True),
    _case("nothing closes", [(0, 2), (4, 3)], "fp8", 0.0, FP32, small=True),
    _case("demo decode", [(127, 1), (128, 1), (300, 1)], "small", 1e-5, FP32, small=True, fillers=1),
    _case("demo chunks", [(0, 130), (120, 9), (255, 1), (50, 4)], "small", 1e-5, FP32, small=True),
    _case("columns of fp32", [(0, 130), (120, 9)], "small", 1e-5, FP32, small=True, before=48),
    _case("columns", MANY, "fp8", 2e-3, before=512),
    _case("fp8 of fp32", [(100, 30), (250, 8)], "fp8", 2e-3, FP32, small=True),
    _case("fp8 decode", DECODE, "fp8", 2e-3, fillers=2),
    _case("fp8 chunks", MANY, "fp8", 2e-3),
    _case("fp8 prefill", [(0, 8192)], "fp8", 2e-3),
    _case("bf16 decode", DECODE, "bf16", 2e-3, fillers=2),
    _case("bf16 chunks", MANY, "bf16", 2e-3),
)


def _bench(name: str, chunks: Chunks, kind: str) -> Bench:
    form, _, rope = form_of(kind)
    tokens = sum(length for _, length in chunks)
    closed = sum((start + length) // 128 - start // 128 for start, length in chunks)
    num_bytes = tokens * 2 * form.width * 4 + len(chunks) * 6 * form.width * 4 + closed * (form.data_bytes + form.scale_bytes + rope * 4)
    return Bench(f"{name} {kind}", _draw(chunks, kind, torch.bfloat16), num_bytes)


BENCH = (
    *(_bench(f"decode {n}", [(1000 + 37 * i, 1) for i in range(n)], "fp8") for n in (1, 32, 128)),
    _bench("prefill 8192", [(0, 8192)], "fp8"),
)

"""Ratio-4 compression at V4 shapes: entries (512 channels) and index keys (128), decode at every place of a block, chunks of several
prompts that begin and end inside blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from engine.cache.rows import RowFormat, index_rows, kv_rows
from engine.model.rope import rotation
from engine.ops.cases import Bench, Case, Draw, randn, relative_error
from engine.ops.paged_cases import empty_pool, places_of

EPS = 1e-6
REASON = (
    "pooling, norm and rotation in fp32: beside a rounding boundary of bf16, and then of the row format, a value falls on its other side"
)
Chunks = Sequence[tuple[int, int]]
"""(position of the first token, tokens)."""


def frequencies(rope: int) -> torch.Tensor:
    return 1.6e5 ** (-torch.arange(0, rope, 2) / rope)


def form_of(kind: str) -> tuple[RowFormat, bool, int]:
    """(format, is_index, rotated channels) of "fp8", "bf16" and "fp32" entries and of "index fp8", ...; "small" is of the demo model."""
    if kind.startswith("index "):
        return index_rows(kind.removeprefix("index "), 128), True, 64
    return (kv_rows("fp32", 64, 16), False, 16) if kind == "small" else (kv_rows(kind, 512, 64), False, 64)


def _draw(chunks: Chunks, kind: str, dtype: torch.dtype, fillers: int = 0, before: int = 0) -> Draw:
    def draw(device: torch.device, seed: int) -> tuple[object, ...]:
        form, is_index, rope = form_of(kind)
        dim = form.width
        places, num_pages, num_slots = places_of(device, seed, chunks, fillers)
        tokens = len(places.positions_T)
        ring = randn(device, seed + 1, num_slots, 8, 4, dim)
        projected = randn(device, seed + 2, tokens, before + 4 * dim)[:, before:]
        ape = randn(device, seed + 3, 4, 2 * dim)
        weight = (randn(device, seed + 4, dim, scale=0.1) + 1).to(torch.bfloat16)
        cos, sin = rotation(places.positions_T // 4 * 4, frequencies(rope).to(device))
        pool = empty_pool(device, form, max(num_pages, 1), 64)
        return projected, ape, ring, places, weight, cos, sin, EPS, dtype, is_index, pool

    return draw


def check_of(form: RowFormat, bound: float) -> Callable[[Sequence[torch.Tensor], Sequence[torch.Tensor]], None]:
    """What is kept in the slots, then the pool."""

    def check(outputs: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> None:
        (kept, *rows), (wanted, *wanted_rows) = outputs, expected
        error = relative_error(kept, wanted)
        assert error <= 1e-5, f"in the slots: relative error {error:.3g}"
        values, wanted_values = form.decode(*rows), form.decode(*wanted_rows)
        assert torch.equal(values.abs().sum(-1) > 0, wanted_values.abs().sum(-1) > 0), "other rows of the pool are written"
        error = relative_error(values, wanted_values)
        assert error <= bound, f"in the pool: relative error {error:.3g} > {bound:g} ({REASON})"

    return check


FP32 = torch.float32


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
    return Case(name, _draw(chunks, kind, dtype, fillers, before), bound, REASON, small, written=(2, 10), check=check)


DECODE = [(position, 1) for position in (0, 1, 2, 3, 4, 7, 8, 11, 252, 255, 256, 259, 1023, 70_003)]
MANY = [(0, 3), (0, 4), (0, 300), (1, 2), (3, 1), (5, 6), (250, 20), (1021, 700), (4095, 9)]
SMALL_DECODE, SMALL_CHUNKS = [(3, 1), (6, 1), (259, 1)], [(0, 5), (2, 9), (254, 7)]
CASES = (
    _case("no tokens", [], "fp8", 0.0, small=True),
    _case("nothing closes", [(0, 2), (4, 3)], "fp8", 0.0, FP32, small=True),
    _case("demo decode", SMALL_DECODE, "small", 1e-5, FP32, small=True, fillers=1),
    _case("demo chunks", SMALL_CHUNKS, "small", 1e-5, FP32, small=True),
    _case("columns of fp32", SMALL_CHUNKS, "small", 1e-5, FP32, small=True, before=48),
    _case("columns", MANY, "index fp8", 1e-2, before=2048),
    _case("fp8 of fp32", SMALL_CHUNKS, "fp8", 2e-3, FP32, small=True),
    _case("index fp8 of fp32", SMALL_CHUNKS, "index fp8", 1e-3, FP32, small=True),
    _case("index fp4 of fp32", SMALL_DECODE, "index fp4", 1e-3, FP32, small=True),
    _case("fp8 decode", DECODE, "fp8", 2e-3, fillers=2),
    _case("fp8 chunks", MANY, "fp8", 2e-3),
    _case("fp8 prefill", [(0, 8192)], "fp8", 2e-3),
    _case("bf16 decode", DECODE, "bf16", 2e-3, fillers=2),
    _case("bf16 chunks", MANY, "bf16", 2e-3),
    _case("index fp8 decode", DECODE, "index fp8", 1e-2, fillers=2),
    _case("index fp8 chunks", MANY, "index fp8", 1e-2),
    _case("index fp8 prefill", [(0, 8192)], "index fp8", 1e-2),
    _case("index fp4 chunks", MANY, "index fp4", 2e-2),
    _case("index bf16 chunks", MANY, "index bf16", 2e-3),
)


def _bench(name: str, chunks: Chunks, kind: str) -> Bench:
    form, _, rope = form_of(kind)
    tokens, row_bytes = sum(length for _, length in chunks), 4 * form.width * 4
    closed = sum((start + length) // 4 - start // 4 for start, length in chunks)
    kept = sum(min(length, 8) for _, length in chunks)
    before = sum(min(start, 7) for start, length in chunks) // (4 if tokens == len(chunks) else 1)
    num_bytes = (tokens + kept + before) * row_bytes + closed * (form.data_bytes + form.scale_bytes + rope * 4)
    return Bench(f"{name} {kind}", _draw(chunks, kind, torch.bfloat16), num_bytes)


BENCH = tuple(
    _bench(name, chunks, kind)
    for kind in ("fp8", "index fp8")
    for name, chunks in (
        *((f"decode {n}", [(1000 + 37 * i, 1) for i in range(n)]) for n in (1, 32, 128)),
        ("prefill 8192", [(0, 8192)]),
    )
)

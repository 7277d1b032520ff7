"""kv_store into windows (a slot a sequence, 128 rows, at a distance as in the arena) in each row format."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from engine.cache.arena import RowPool
from engine.cache.rows import Fp8KvRows, PlainRows, RowFormat
from engine.ops.cases import Bench, Case, Draw, generator, randn, relative_error
from engine.ops.q_norm_rope.cases import angles

EPS = 1e-6
ROWS = 128
REASON = "norm and rotation in fp32: beside a rounding boundary of bf16, and then of e4m3, a value falls on its other side"
FP8 = Fp8KvRows()
BF16 = PlainRows(512, torch.bfloat16)
SMALL = PlainRows(64, torch.float32)


def pool(device: torch.device, units: int, rows: int, form: RowFormat, gap: int = 1152) -> RowPool:
    """Rows as an arena lays them: all data of a unit, then all scales, then `gap` bytes of other layers. Filled with 0x11."""
    split, end = rows * form.data_bytes, rows * (form.data_bytes + form.scale_bytes)
    memory = torch.full((units, end + gap), 0x11, dtype=torch.uint8, device=device)
    data = memory[:, :split].unflatten(1, (rows, form.data_bytes))
    if not form.scale_bytes:
        return RowPool(form, data, memory[:, :0].unsqueeze(1).expand(-1, rows, -1))
    return RowPool(form, data, memory[:, split:end].unflatten(1, (rows, form.scale_bytes)))


def _draw(tokens: int, form: RowFormat, dtype: torch.dtype = torch.bfloat16, units: int = 4, spread: float = 1.0, before: int = 0) -> Draw:
    """Each token a place of its own; every fifth is not stored. kv stands behind `before` columns of something else."""

    def draw(device: torch.device, seed: int) -> tuple[object, ...]:
        rope = 64 if form.width == 512 else 16
        places = torch.randperm(units * ROWS, generator=generator(device, seed), device=device)[:tokens]
        assert len(places) == tokens
        chosen = torch.where(torch.arange(tokens, device=device) % 5 == 4, -1, places // ROWS)
        kv = randn(device, seed + 1, tokens, before + form.width, dtype=dtype, scale=spread)[:, before:]
        weight = (randn(device, seed + 2, form.width, scale=0.1) + 1).to(torch.bfloat16)
        return kv, weight, *angles(device, seed + 3, tokens, rope), EPS, pool(device, units, ROWS, form), chosen, places % ROWS

    return draw


def _check(form: RowFormat, bound: float) -> Callable[[Sequence[torch.Tensor], Sequence[torch.Tensor]], None]:
    def check(outputs: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> None:
        values, data, scale = outputs
        error = relative_error(values, expected[0])
        assert error <= bound, f"values: relative error {error:.3g} > {bound:g}"
        error = relative_error(form.decode(data, scale), form.decode(*expected[1:]))
        assert error <= bound, f"rows in the pool: relative error {error:.3g} > {bound:g}"
        padding = [tensor.flatten(0, 1)[:, 7:] for tensor in (scale, expected[2])]
        assert torch.equal(*padding), "padding bytes"

    return check


TRUNCATED = 0.13
"""Triton's interpreter truncates where a GPU rounds to nearest: one step of e4m3."""


def _case(name: str, draw: Draw, form: RowFormat = FP8, bound: float = 2e-3, small: bool = False) -> Case:
    return Case(name, draw, bound, REASON, small, written=(5,), check=_check(form, bound))


CASES = (
    _case("no tokens", _draw(0, FP8), small=True),
    _case("small heads in fp32", _draw(7, SMALL, torch.float32), SMALL, 1e-6, small=True),
    _case("layout of fp8", _draw(6, FP8, torch.float32), FP8, TRUNCATED, small=True),
    _case("layout of bf16", _draw(3, BF16, torch.float32), BF16, TRUNCATED, small=True),
    _case("fp8 of fp32", _draw(6, FP8, torch.float32)),
    _case("columns in fp32", _draw(7, SMALL, torch.float32, before=32), SMALL, 1e-6, small=True),
    _case("columns", _draw(70, FP8, before=1024)),
    _case("one token", _draw(1, FP8)),
    _case("fp8 batch", _draw(129, FP8)),
    _case("tiny values", _draw(33, FP8, spread=1e-6)),
    _case("bf16 batch", _draw(129, BF16), BF16),
    _case("fp8 prefill", _draw(2050, FP8, units=20)),
)


def _bench(tokens: int, form: RowFormat) -> Bench:
    num_bytes = tokens * (512 * 2 + 64 * 4 + 16 + form.data_bytes + form.scale_bytes + 512 * 2)
    return Bench(f"T={tokens} {'fp8' if form is FP8 else 'bf16'}", _draw(tokens, form, units=tokens // ROWS + 1), num_bytes)


BENCH = (_bench(1, FP8), _bench(128, FP8), _bench(128, BF16), _bench(8192, FP8))

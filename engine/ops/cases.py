"""What an op's `cases.py` is made of: inputs that every backend must agree on with the reference, and shapes to time.

    CASES: tuple[Case, ...]    realistic, edge and empty shapes; tests/parity/test_ops.py walks ops x backends x cases
    BENCH: tuple[Bench, ...]   rows of `python -m tests.benchmarks.bench_ops`

Arguments are drawn on a device from a seed. Where an op takes packed weights, `Weights` stands in the arguments with what the
backend's `pack` gets; an argument that the op writes to is drawn like any other, and named in `Case.written`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from engine.config import EngineConfig
from engine.ops.registry import Op, load_backend, load_widen

Draw = Callable[[torch.device, int], tuple[Any, ...]]
"""(device, seed) -> the op's arguments. The same seed gives the same values on one device, not on every device."""


@dataclass(frozen=True, slots=True)
class Weights:
    """Stands for `pack(*args)`."""

    args: tuple[Any, ...]
    is_wide: bool = False
    """And then `widen` of it, where the backend offers that."""


@dataclass(frozen=True, slots=True)
class Case:
    name: str
    draw: Draw
    tolerance: float
    """Largest relative error ||out - ref|| / ||ref|| of a float output; integer outputs must be equal."""
    reason: str
    """Why this much: what is rounded where."""
    small: bool = False
    """Small enough for Triton's interpreter on CPU (well under a second)."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """Formats of the arguments: a backend that does not suit them is left out."""
    written: tuple[int, ...] = ()
    """Arguments that the op writes to: compared after it, beside what it returns; a RowPool as its data, then its scales, Histories
    as their words."""
    check: Callable[[Sequence[torch.Tensor], Sequence[torch.Tensor]], None] | None = None
    """In place of the comparison by tolerance: (outputs, outputs of the reference); raises AssertionError."""


@dataclass(frozen=True, slots=True)
class Bench:
    name: str
    draw: Draw
    num_bytes: int
    """The least that must be moved: every input read once, every output written once."""
    num_flops: int = 0
    """2 per multiply-add."""
    rate: str = ""
    """"bf16" or "fp8": the matrix rate that num_flops is compared with. Empty: bandwidth only."""
    baselines: Mapping[str, Callable[[torch.device, int], Callable[[], object]]] = field(default_factory=dict)
    """Name -> (device, seed) -> a call to time in the same run, for comparison."""


def generator(device: torch.device, seed: int) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def randn(device: torch.device, seed: int, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> torch.Tensor:
    """Normal values; one seed for each tensor of a case."""
    return (torch.randn(*shape, generator=generator(device, seed), device=device) * scale).to(dtype)


def prepared(op: Op, backend: str, args: tuple[Any, ...]) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The backend's function, and `args` with their `Weights` packed for it."""
    run, pack = load_backend(op, backend)
    packed = []
    for arg in args:
        if isinstance(arg, Weights):
            assert pack is not None, f"{op.name} has no packed weights"
            widen = load_widen(op, backend) if arg.is_wide else None
            arg = pack(*arg.args) if widen is None else widen(pack(*arg.args))
        packed.append(arg)
    return run, tuple(packed)


def relative_error(out: torch.Tensor, ref: torch.Tensor) -> float:
    """||out - ref|| / ||ref|| in float64; inf where shape or dtype differ or a value is not finite on one side only."""
    if out.shape != ref.shape or out.dtype != ref.dtype:
        return float("inf")
    out64, ref64 = out.detach().double().cpu(), ref.detach().double().cpu()
    same = (out64 == ref64) | (out64.isnan() & ref64.isnan())
    difference = torch.where(same, torch.zeros_like(ref64), out64 - ref64).norm()
    scale = torch.where(ref64.isfinite(), ref64, torch.zeros_like(ref64)).norm()
    error = float(difference / scale) if float(scale) > 0 else float(difference)
    return error if error == error else float("inf")

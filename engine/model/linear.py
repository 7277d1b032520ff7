"""Projections whose weights were packed for the backend chosen at start."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from engine.config import ModelConfig
from engine.model.quantized import QuantizedRows, QuantizedWeight, Weight, stack_rows, to_float64
from engine.model.side_stream import SideStream
from engine.ops.registry import BoundOps
from engine.parallel.experts import ExpertShare
from engine.parallel.heads import HeadShare


@dataclass(frozen=True, slots=True)
class Build:
    """What every part of the model is built from; passed down, never stored globally."""

    model: ModelConfig
    ops: BoundOps
    weights: Mapping[str, Weight]
    """By published name."""
    dtype: torch.dtype
    """Of activations: bfloat16, or float32 for comparison with other implementations."""
    share: ExpertShare | None = None
    """The experts of this rank, in a group; None: all are here."""
    heads: HeadShare | None = None
    """The heads of this rank, where ranks attend together; None: all are here."""
    sides: tuple[SideStream, SideStream] = (SideStream(torch.device("cpu")), SideStream(torch.device("cpu")))
    """For work that can be done beside the main stream's."""

    @property
    def quantize(self) -> bool:
        """Whether activations are quantised before FP8 and MXFP4 products."""
        return self.dtype == torch.bfloat16

    def tensor(self, name: str) -> torch.Tensor:
        """A weight that is never quantised, as read."""
        weight = self.weights[name]
        assert isinstance(weight, torch.Tensor), f"{name} is quantised"
        return weight


class Linear:
    """y = x W^T. An FP8 weight quantises its input too (in bfloat16 mode); `out_dtype` other than the input's is only for plain ones."""

    def __init__(self, build: Build, name: str, out_dtype: torch.dtype | None = None) -> None:
        self._take(build, build.weights[name], out_dtype)

    @classmethod
    def of(cls, build: Build, weight: Weight, out_dtype: torch.dtype | None = None) -> Linear:
        """Of a weight that is at hand."""
        linear = cls.__new__(cls)
        linear._take(build, weight, out_dtype)
        return linear

    def _take(self, build: Build, weight: Weight, out_dtype: torch.dtype | None) -> None:
        self.shape = tuple(weight.shape)
        """(N, K)."""
        self._fp8 = isinstance(weight, QuantizedWeight) and weight.kind == "fp8" and build.quantize
        if self._fp8:
            self._op, self._weight = build.ops.fp8_linear, build.ops.pack["fp8_linear"](weight)
        else:
            plain = to_float64(weight) if isinstance(weight, QuantizedWeight) else weight
            self._op, self._weight = build.ops.linear, build.ops.pack["linear"](plain)
        self._out_dtype = out_dtype or build.dtype

    @property
    def takes_quantized(self) -> bool:
        """Whether the input may be quantised already."""
        return self._fp8

    def __call__(self, x: torch.Tensor | QuantizedRows) -> torch.Tensor:
        """x: [..., K] -> [..., N]."""
        y: torch.Tensor = self._op(x, self._weight) if self._fp8 else self._op(x, self._weight, self._out_dtype)
        return y


class Linears:
    """Projections of the same input: one product whose columns are theirs, where the weights can stand in one matrix as they are."""

    def __init__(self, build: Build, groups: tuple[tuple[str, ...], ...], out_dtype: torch.dtype | None = None) -> None:
        """`groups`: the weights of each projection, whose outputs stand side by side."""
        weights = [[build.weights[name] for name in group] for group in groups]
        self._widths = [sum(weight.shape[0] for weight in group) for group in weights]
        stacked = stack_rows([weight for group in weights for weight in group])
        self._whole = None if stacked is None else Linear.of(build, stacked, out_dtype)
        self._parts = [[Linear.of(build, weight, out_dtype) for weight in group] for group in weights] if stacked is None else []

    @property
    def takes_quantized(self) -> bool:
        """Whether the input may be quantised already."""
        return self._whole is not None and self._whole.takes_quantized

    def __call__(self, x: torch.Tensor | QuantizedRows) -> tuple[torch.Tensor, ...]:
        """x: [T, K] -> [T, N] of each group, rows possibly further apart than they are long."""
        if self._whole is not None:
            return self._whole(x).split(self._widths, dim=1)
        return tuple(parts[0](x) if len(parts) == 1 else torch.cat([part(x) for part in parts], dim=1) for parts in self._parts)

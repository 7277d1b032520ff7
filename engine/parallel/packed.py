"""One expert of packed weights in the place of another, whatever a backend of `moe_experts` packs them into.

Packed weights are a dataclass. Tensors with one entry an expert have experts as their first dimension; tensors that are equally large for
one expert are room to work in; bools are claims about all experts; other values describe all of them alike.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch

from core.errors import ConfigError


def check_expert(packed: Any, one: Any) -> None:
    """Raise ConfigError unless the only expert of `one` can take any place in `packed`."""
    for name, mine, other in _values(packed, one):
        if isinstance(mine, torch.Tensor):
            fits = mine.shape[1:] == other.shape[1:] and mine.dtype == other.dtype and len(other) in (1, len(mine))
        else:
            fits = mine == other or (isinstance(mine, bool) and other is True)
        if not fits:
            raise ConfigError(f"an expert whose {name} is {_said(other)} cannot come to where it is {_said(mine)}")


def put_expert(packed: Any, place: int, one: Any) -> None:
    """Overwrite the expert at `place`. `check_expert` must have passed."""
    for _, mine, other in _values(packed, one):
        if isinstance(mine, torch.Tensor) and len(other) == 1:
            mine[place].copy_(other[0])


def _values(packed: Any, one: Any) -> Iterator[tuple[str, Any, Any]]:
    for field in dataclasses.fields(packed):
        mine, other = getattr(packed, field.name), getattr(one, field.name)
        if dataclasses.is_dataclass(mine):
            yield from _values(mine, other)
        else:
            yield field.name, mine, other


def _said(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)

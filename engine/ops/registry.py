"""Ops: named functions with one definition (the reference) and any number of faster bodies, chosen once at start.

An op is a folder `engine/ops/<name>/` whose `__init__.py` defines

    OP = Op("<name>", reference, backends={"triton": Impl("engine.ops.<name>.triton", requires), ...})

where `reference` is the definition: its signature, docstring, semantics and CPU path. A backend module offers a function
`run` with the same signature. `requires(device)` answers None, or the reason why the backend cannot run there. The layout of
weights belongs to the backend: an op with weights has a `pack` function (the backend module its own), called once at load. A backend may
offer `widen` too: packed weights -> the same values in a larger form that is quicker for many tokens.

    ops = bind(engine, device)   # engine.ops names choices; the rest: first usable backend, else the reference
    ops.rms_norm(x, weight, eps)
    weight = ops.pack["fp8_linear"](checkpoint_weight)
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from core.errors import ConfigError
from engine.config import EngineConfig
from engine.ops.names import OP_NAMES


def _any_format(engine: EngineConfig) -> str | None:
    return None


@dataclass(frozen=True, slots=True)
class Impl:
    module: str
    """Imported only when chosen."""
    requires: Callable[[torch.device], str | None]
    """None if it can run on the device, else the reason why not."""
    suits: Callable[[EngineConfig], str | None] = _any_format
    """None if it can run with these formats, else the reason why not."""


@dataclass(frozen=True, slots=True)
class Op:
    name: str
    reference: Callable[..., Any]
    pack: Callable[..., Any] | None = None
    """Checkpoint weight -> what `reference` takes; None for an op without packed weights."""
    backends: Mapping[str, Impl] = field(default_factory=dict)
    """In order of preference; all are preferred to the reference where they can run."""


@dataclass(frozen=True, slots=True)
class Choice:
    op: str
    backend: str
    reasons: tuple[str, ...]
    """Why each preferred backend was passed over."""


class BoundOps:
    """The chosen function of every op as an attribute, and `choices` for the start-up table."""

    def __init__(
        self,
        functions: dict[str, Callable[..., Any]],
        pack: dict[str, Callable[..., Any]],
        choices: tuple[Choice, ...],
        widen: Mapping[str, Callable[[Any], Any]] | None = None,
        named: frozenset[str] = frozenset(),
    ) -> None:
        self.choices = choices
        self.named = named
        """Ops whose backend engine.ops names. A backend that finds only when it is used that it cannot serve may leave the work to another
        one if it was chosen here, and raises ConfigError if it was named."""
        self.pack = pack
        self.widen = widen or {}
        """Of ops whose backend offers it."""
        self.__dict__.update(functions)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        raise AttributeError(f"no op named {name!r}")

    def table(self) -> str:
        """One line an op: its backend, and why not a preferred one."""
        width = max(len(choice.op) for choice in self.choices)
        lines = [f"{choice.op:<{width}}  {choice.backend:<10} {'; '.join(choice.reasons)}".rstrip() for choice in self.choices]
        return "\n".join(lines)


def get_op(name: str) -> Op:
    op = importlib.import_module(f"engine.ops.{name}").OP
    assert isinstance(op, Op) and op.name == name, f"engine.ops.{name}.OP is {op!r}"
    return op


def load_backend(op: Op, backend: str) -> tuple[Callable[..., Any], Callable[..., Any] | None]:
    """The function of a backend (its signature must be the reference's) and its pack function."""
    if backend == "reference":
        return op.reference, op.pack
    module = importlib.import_module(op.backends[backend].module)
    run: Callable[..., Any] = module.run
    wanted, found = (list(inspect.signature(function).parameters) for function in (op.reference, run))
    assert wanted == found, f"{op.name}.{backend}: parameters {found}, the reference has {wanted}"
    return run, module.pack if op.pack else None


def load_widen(op: Op, backend: str) -> Callable[[Any], Any] | None:
    """A backend's `widen`; None if it offers none."""
    return None if backend == "reference" else getattr(importlib.import_module(op.backends[backend].module), "widen", None)


def bind(engine: EngineConfig, device: torch.device) -> BoundOps:
    """Choose a backend for every op: the one that engine.ops names, else the first that can run here. In float32 mode, which is for
    comparison, only named ones replace the reference. Raises ConfigError for a named one that cannot run.
    """
    functions, packs, widens, choices = {}, {}, {}, []
    for name in OP_NAMES:
        op = get_op(name)
        reasons = {backend: impl.requires(device) or impl.suits(engine) for backend, impl in op.backends.items()}
        wanted = engine.ops.get(name)
        if wanted is None:
            usable = [backend for backend, reason in reasons.items() if reason is None and engine.dtype == "bfloat16"]
            chosen = usable[0] if usable else "reference"
        elif wanted == "reference" or (wanted in op.backends and reasons[wanted] is None):
            chosen = wanted
        else:
            allowed = ", ".join(("reference", *(backend for backend, reason in reasons.items() if reason is None)))
            raise ConfigError(f"engine.ops.{name}: backend {wanted!r} cannot run here: {reasons[wanted]}; allowed here: {allowed}")
        functions[name], pack = load_backend(op, chosen)
        if pack is not None:
            packs[name] = pack
            widen = load_widen(op, chosen)
            if widen is not None:
                widens[name] = widen
        known = list(reasons)
        passed_over = known[: known.index(chosen)] if chosen in known else known
        choices.append(Choice(name, chosen, tuple(f"{backend}: {reasons[backend] or 'not asked for'}" for backend in passed_over)))
    return BoundOps(functions, packs, tuple(choices), widens, frozenset(engine.ops))

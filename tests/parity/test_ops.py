"""Every backend of every op against the reference, on the cases of `engine/ops/<op>/cases.py`: on a GPU all of them; on CPU the
Triton ones, interpreted, on small shapes."""

from __future__ import annotations

import gc
import importlib
import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from engine.ops import cases
from engine.ops.names import OP_NAMES
from engine.ops.registry import get_op
from tests.support.interpreted_ops import is_triton, small_cases
from tests.support.op_outputs import compare, outputs_of
from tests.support.patience import overload

CPU_SECONDS = 240

WITH_BACKENDS = [name for name in OP_NAMES if get_op(name).backends and name != "expert_exchange"]  # that one needs a group of ranks
GPU = [
    pytest.param(name, backend, case, id=f"{name}.{backend}-{case.name}".replace(" ", "_"))
    for name in WITH_BACKENDS
    for backend in get_op(name).backends
    for case in importlib.import_module(f"engine.ops.{name}.cases").CASES
]
INTERPRETED = [
    (name, backend, case.name)
    for name in WITH_BACKENDS
    for backend, impl in get_op(name).backends.items()
    if is_triton(impl.module)
    for case in small_cases(name)
]


@pytest.fixture(scope="session")
def interpreted() -> dict[tuple[str, str, str], dict[str, Any]]:
    """(op, backend, case) -> what came out, from one process for all."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "tests.support.interpreted_ops"]
    done = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=CPU_SECONDS * overload(), check=False
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {(row["op"], row["backend"], row["case"]): row for row in rows}


@pytest.mark.parametrize(("op", "backend", "case"), INTERPRETED)
def test_an_interpreted_kernel_agrees_with_the_reference(op: str, backend: str, case: str, interpreted: dict[Any, Any]) -> None:
    row = interpreted[op, backend, case]
    assert row["problem"] is None, row["problem"]


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "backend", "case"), GPU)
def test_a_backend_agrees_with_the_reference(name: str, backend: str, case: cases.Case, rng: Any) -> None:
    device, seed = torch.device("cuda"), rng.randrange(2**31)
    op = get_op(name)
    reason = op.backends[backend].requires(device) or op.backends[backend].suits(case.engine)
    if reason is not None:
        pytest.skip(reason)
    expected = [tensor.cpu() for tensor in outputs_of(op, "reference", case, device, seed)]
    gc.collect()
    outputs = outputs_of(op, backend, case, device, seed)
    torch.cuda.synchronize()
    print("relative errors:", compare(case, [tensor.cpu() for tensor in outputs], expected))


@pytest.mark.parametrize("name", WITH_BACKENDS)
def test_cases_have_empty_small_and_named_shapes(name: str) -> None:
    found = importlib.import_module(f"engine.ops.{name}.cases").CASES
    names = [case.name for case in found]
    assert len(set(names)) == len(names) >= 3
    assert any(case.small for case in found), "nothing for the interpreter"
    assert all(case.reason for case in found)

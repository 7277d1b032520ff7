"""Run Triton backends of ops on CPU, interpreted: `TRITON_INTERPRET=1 python -m tests.support.interpreted_ops [OP ...]`.

A process of its own, since Triton decides at import between compiling and interpreting. Prints one JSON line a small case:
{"op", "backend", "case", "problem": null or text, "errors": relative errors}.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback

import torch

from engine.ops import cases
from engine.ops.names import OP_NAMES
from engine.ops.registry import get_op
from tests.support.op_outputs import compare, outputs_of

CPU = torch.device("cpu")
SEED = 11


def is_triton(module: str) -> bool:
    """Interpretable backends live in modules named triton.py."""
    return module.endswith(".triton")


def small_cases(op: str) -> list[cases.Case]:
    return [case for case in importlib.import_module(f"engine.ops.{op}.cases").CASES if case.small]


def main(names: list[str]) -> None:
    assert os.environ.get("TRITON_INTERPRET") == "1", "set TRITON_INTERPRET=1"
    torch.set_num_threads(1)
    for name in names or OP_NAMES:
        op = get_op(name)
        backends = [backend for backend, impl in op.backends.items() if is_triton(impl.module)]
        for case in small_cases(name) if backends else []:
            expected = outputs_of(op, "reference", case, CPU, SEED)
            for backend in backends:
                problem, errors = None, []
                try:
                    errors = compare(case, outputs_of(op, backend, case, CPU, SEED), expected)
                except Exception:
                    problem = traceback.format_exc()
                print(json.dumps({"op": name, "backend": backend, "case": case.name, "problem": problem, "errors": errors}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])

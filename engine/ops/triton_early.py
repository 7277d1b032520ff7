"""Kernels that start while the ones before them end: programmatic dependent launch, of Hopper and later.

    kernel[grid](..., **early(rows))

A kernel launched so may start as soon as all programs of the kernel before it (in its stream; in a graph, of those it depends on) have
said `let_next_start`, or have ended; until it has passed `wait_for_previous` it runs beside them, and behind it sees all that they wrote.

Every kernel here begins with `begin()`, or with its two halves around `fetch_rows`. What makes that safe:

* Before `wait_for_previous` a kernel writes nothing, and reads only what no kernel writes (weights).
* All its programs wait, whatever else they do. So its end says that everything before it has ended, and whoever waits for it, early or
  not, need not know how those before it were launched; memory may be written again as in a plain stream.

Launched without `early` the instructions do nothing, and interpreted there are none.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda

from engine.ops.triton_rounding import INTERPRETED

MOST_ROWS = 0
"""Rows of a step up to which kernels are launched early; 0: never. With many rows waiting programs hold room that others need."""
FETCHED_BYTES = 1024
"""Of each of its rows of the weight that a program asks for while it waits."""
CONTROLS = tl.constexpr(not INTERPRETED and torch.version.hip is None)


def early(rows: int) -> dict[str, Any]:
    """Options of a launch for so many rows."""
    return {"launch_pdl": True} if is_early(rows) else {}


def is_early(rows: int) -> bool:
    return rows <= MOST_ROWS and bool(CONTROLS)


def fetched_bytes(rows: int) -> int:
    """What `fetch_rows` is to be given: nothing, where a launch is not early."""
    return FETCHED_BYTES if is_early(rows) else 0


@triton.jit
def let_next_start():
    if CONTROLS:
        cuda.gdc_launch_dependents()


@triton.jit
def wait_for_previous():
    if CONTROLS:
        cuda.gdc_wait()


@triton.jit
def begin():
    let_next_start()
    wait_for_previous()


@triton.jit
def fetch_rows(rows, num_bytes, PIECES: tl.constexpr):
    """Ask for num_bytes of each row (int64 [N], addresses; all multiples of 16) to be brought into L2, in so many pieces each."""
    if CONTROLS:
        piece = num_bytes // (16 * PIECES) * 16
        at = rows[:, None] + tl.arange(0, PIECES)[None, :] * piece
        tl.inline_asm_elementwise(
            "cp.async.bulk.prefetch.L2.global [$1], $2; // $0",
            "=r,l,r",
            [at, tl.zeros(at.shape, tl.int32) + piece],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )

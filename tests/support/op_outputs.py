"""What a backend makes of a case, and whether that is what the reference makes of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine.cache.arena import RowPool
from engine.model.quantized import QuantizedRows
from engine.ops.cases import Case, prepared, relative_error
from engine.ops.registry import Op
from engine.ops.sample import Histories


def outputs_of(op: Op, backend: str, case: Case, device: torch.device, seed: int) -> list[torch.Tensor]:
    """What the op returns and what it has written to, in that order; of quantised rows the values."""
    run, args = prepared(op, backend, case.draw(device, seed))
    result = run(*args)
    returned = () if result is None else result if isinstance(result, tuple) else (result,)
    returned = tuple(part.double() if isinstance(part, QuantizedRows) else part for part in returned if part is not None)
    written: list[torch.Tensor] = []
    for index in case.written:
        arg = args[index]
        written += (arg.data, arg.scale) if isinstance(arg, RowPool) else (arg.words,) if isinstance(arg, Histories) else (arg,)
    return [*returned, *written]


def compare(case: Case, outputs: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> list[float]:
    """Errors of the float outputs, or AssertionError with what differs."""
    assert len(outputs) == len(expected), f"{len(outputs)} outputs, the reference has {len(expected)}"
    if case.check is not None:
        case.check(outputs, expected)
        return []
    errors = []
    for index, (out, ref) in enumerate(zip(outputs, expected, strict=True)):
        if ref.is_floating_point() and ref.element_size() > 1:
            errors.append(relative_error(out, ref))
            assert errors[-1] <= case.tolerance, f"output {index}: relative error {errors[-1]:.3g} > {case.tolerance:g} ({case.reason})"
        else:
            assert out.shape == ref.shape and out.dtype == ref.dtype, (
                f"output {index}: {out.dtype} {out.shape}, not {ref.dtype} {ref.shape}"
            )
            num_different = (
                int((out.view(torch.uint8) != ref.view(torch.uint8)).sum()) if ref.element_size() == 1 else int((out != ref).sum())
            )
            assert num_different == 0, f"output {index}: {num_different} of {ref.numel()} integers differ"
    return errors

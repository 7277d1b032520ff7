"""The comparison that parity tests rely on finds what it must find."""

from __future__ import annotations

import pytest
import torch

from engine.ops.cases import Case, relative_error
from tests.support.op_outputs import compare

CASE = Case("c", lambda device, seed: (), 1e-3, "a test")
REF = torch.tensor([1.0, -2.0, torch.inf, torch.nan])


def test_a_wrong_value_shape_dtype_or_nan_is_an_error() -> None:
    assert relative_error(REF.clone(), REF) == 0
    assert relative_error(REF * torch.tensor([1.001, 1, 1, 1]), REF) == pytest.approx(0.001 / 5**0.5, rel=1e-3)
    for wrong in (REF.nan_to_num(), torch.full_like(REF, torch.nan), REF.double(), REF[:3], -REF):
        assert relative_error(wrong, REF) == float("inf")
    assert relative_error(torch.ones(2), torch.zeros(2)) > 1


def test_integers_must_be_equal_and_outputs_as_many() -> None:
    ids = torch.tensor([1, 2])
    assert compare(CASE, [ids, REF], [ids, REF]) == [0]
    with pytest.raises(AssertionError, match="1 of 2 integers differ"):
        compare(CASE, [torch.tensor([1, 3])], [ids])
    with pytest.raises(AssertionError, match="1 outputs, the reference has 2"):
        compare(CASE, [ids], [ids, ids])
    with pytest.raises(AssertionError, match="relative error"):
        compare(CASE, [REF[:2] * 1.01], [REF[:2]])

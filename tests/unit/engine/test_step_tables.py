"""Vectors of a step's tables start where kernels that were compiled for aligned pointers take them to, whatever the number of tokens."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime.jit import JITFunction

from engine.batch import TokenPlaces
from engine.ops.step_tables import step_tables
from engine.ops.step_tables import triton as backend


@pytest.mark.parametrize("tokens", [1, 3, 8, 33])
def test_every_table_is_aligned_and_shaped_as_the_reference_has_it(tokens: int) -> None:
    row = torch.arange(tokens)
    places = TokenPlaces(row + 300, row, row + 300, row, torch.zeros(tokens, 4, dtype=torch.int32), is_decode=True)
    arguments = places, torch.ones(32), torch.ones(32), 512, 1024
    with mock.patch.object(JITFunction, "run") as launched:
        found = backend.run(*arguments)
    assert launched.call_count == 1
    for name, mine, wanted in zip(found._fields, found, step_tables(*arguments), strict=True):
        assert mine.data_ptr() % 16 == 0 and mine.is_contiguous(), name
        assert mine.shape == wanted.shape and mine.dtype == wanted.dtype, name

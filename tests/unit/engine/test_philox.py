from __future__ import annotations

import pytest
import torch

from engine.philox import philox, uniforms


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([2**32 - 1] * 4, [2**32 - 1] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0], "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_known_answers_of_the_authors(counter: list[int], key: list[int], expected: str) -> None:
    words = philox(tuple(torch.tensor(word) for word in counter), tuple(torch.tensor(word) for word in key))
    assert " ".join(f"{int(word):08x}" for word in words) == expected


def test_a_number_depends_on_its_seed_position_and_column_alone() -> None:
    seeds, positions = [3, 2**64 - 1, 3, -5], [0, 7, 8, 10**6]
    table = uniforms(seeds, positions, 101)
    assert len(set(table.flatten().tolist())) == table.numel()
    for row, (seed, position) in enumerate(zip(seeds, positions, strict=True)):
        assert torch.equal(uniforms([seed], [position], 101)[0], table[row])
        assert torch.equal(uniforms([seed], [position], 30)[0], table[row, :30])
    assert torch.equal(uniforms([2**64 - 5], [10**6], 101)[0], table[3])  # a negative seed is its 64 bits


def test_numbers_are_uniform_inside_the_open_interval() -> None:
    u = uniforms(list(range(50)), [5] * 50, 4000).flatten()
    assert 0 < float(u.min()) < 1e-4 and 1 - 1e-4 < float(u.max()) < 1
    counts = torch.histc(u, 64, 0, 1)
    chi_square = float(((counts - len(u) / 64) ** 2 / (len(u) / 64)).sum())
    assert chi_square < 140  # 63 degrees of freedom: probability 1e-7
    for lag in (1, 2, 3):
        correlation = torch.corrcoef(torch.stack((u[:-lag], u[lag:])))[0, 1]
        assert abs(float(correlation)) < 0.015  # 6 sigma of 200,000 pairs

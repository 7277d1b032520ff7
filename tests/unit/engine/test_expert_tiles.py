"""Packing of MXFP4 experts for the Triton kernels: what is exact is packed, what is not is refused or not widened."""

from __future__ import annotations

import pytest
import torch

from core.errors import ConfigError
from engine.model.quantized import QuantizedWeight, Weight, quantize_mxfp4
from engine.ops.moe_experts.tiles import PackedExperts
from engine.ops.moe_experts.tiles import pack_experts as pack
from engine.parallel.packed import check_expert, put_expert


def weight(scale: torch.Tensor) -> QuantizedWeight:
    """[128, 128] of 0.5, scale bytes [128, 4]."""
    return QuantizedWeight("mxfp4", torch.full((128, 64), 0x11, dtype=torch.uint8), scale.to(torch.uint8))


def widens(scale: torch.Tensor) -> bool:
    return pack([weight(scale)], [weight(torch.full((128, 4), 120))], [weight(torch.full((128, 4), 120))], True).widens


def test_groups_of_a_row_may_lie_eleven_powers_apart_and_not_twelve() -> None:
    scale = torch.full((128, 4), 120)
    scale[7, 2] = 109
    assert widens(scale)
    scale[7, 2] = 108
    with pytest.raises(ConfigError, match=r"2\^11"):
        widens(scale)


def test_a_group_of_zeros_may_have_any_scale() -> None:
    scale = torch.full((128, 4), 120)
    scale[7] = 0
    zeros = weight(scale)
    zeros.data[7] = 0
    assert pack([zeros], [zeros], [zeros], True).widens


def test_tiles_whose_rows_lie_too_far_apart_are_not_widened() -> None:
    scale = torch.full((128, 4), 120)
    scale[3] = 106
    assert widens(scale)
    scale[3] = 105
    assert not widens(scale)


def test_an_expert_in_tiles_takes_anothers_place() -> None:
    def drawn(seeds: tuple[int, ...]) -> PackedExperts:
        def draw(which: int) -> list[Weight]:
            return [quantize_mxfp4(torch.randn(160, 160, generator=torch.Generator().manual_seed(3 * seed + which))) for seed in seeds]

        return pack(draw(0), draw(1), draw(2), True)

    mine, one, expected = drawn((0, 1, 2)), drawn((7,)), drawn((0, 7, 2))
    check_expert(mine, one)
    put_expert(mine, 1, one)
    for tiles, wanted in ((mine.w13, expected.w13), (mine.w2, expected.w2)):
        assert torch.equal(tiles.codes, wanted.codes) and torch.equal(tiles.scale, wanted.scale)


def test_unquantised_and_mixed_experts_are_refused() -> None:
    plain, quantized = torch.zeros(128, 128), quantize_mxfp4(torch.randn(128, 128))
    for w1 in (plain, QuantizedWeight("fp8", plain.to(torch.float8_e4m3fn), torch.full((1, 1), 127, dtype=torch.uint8))):
        with pytest.raises(ConfigError, match="all MXFP4 or all FP8"):
            pack([w1], [quantized], [quantized], True)
    with pytest.raises(ConfigError, match="float32"):
        pack([quantized], [quantized], [quantized], False)


def test_tiles_are_for_the_rows_of_an_expert_and_not_for_those_that_pass_by(monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("engine.ops.moe_experts.triton")
    one = quantize_mxfp4(torch.randn(128, 128, generator=torch.Generator().manual_seed(0)))
    experts, x, weights = pack([one] * 4, [one] * 4, [one] * 4, True), torch.zeros(256, 128), torch.ones(256, 6)
    ids, chosen = torch.full((256, 6), -1), []
    monkeypatch.setattr(triton, "run_with", lambda *arguments: chosen.append(arguments[-1]))
    for among in (None, 4, 60, 256):
        triton.run(x, ids, weights, experts, 10.0, among=among)
    assert chosen == [triton.Many(), triton.Many(), triton.BLOCKS_OF_32, triton.BLOCKS_OF_16]

"""Byte maps of pages and slots."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from core.errors import ConfigError
from core.kv_layout import KVLayout
from engine.cache.arena import Arena, ModelCaches
from engine.cache.layout import build_layout
from engine.config import EngineConfig, ModelConfig
from tests.support.checkpoints import SMALL, TINY

FLASH: dict[str, Any] = SMALL | {"num_hidden_layers": 43, "compress_ratios": [0, 0, *[4, 128] * 20, 4, 0]}


def layout_of(config: dict[str, Any], **engine: Any) -> KVLayout:
    return build_layout(ModelConfig.from_dict(config), EngineConfig(device="cpu", **engine), "m")


def test_flash_has_the_published_sizes() -> None:
    layout = layout_of(FLASH)
    assert layout.page_bytes == 1_002_240
    assert layout.slot_bytes == 5_076_288


@pytest.mark.parametrize("formats", [("fp8", "fp8"), ("fp8", "fp4"), ("bf16", "bf16"), ("fp32", "fp32")])
def test_fields_lie_one_after_the_other(formats: tuple[str, str]) -> None:
    layout = layout_of(SMALL, kv_format=formats[0], index_format=formats[1])
    for fields, total in ((layout.page_fields, layout.page_bytes), (layout.slot_fields, layout.slot_bytes)):
        for one, following in itertools.pairwise(fields):
            assert one.offset + one.num_bytes == following.offset
        assert fields[-1].offset + fields[-1].num_bytes <= total
        assert all(field.rows * field.row_bytes <= field.num_bytes and field.offset % 576 == 0 for field in fields)
        assert total % 576 == 0


def test_a_layout_survives_its_json_and_differences_are_named() -> None:
    layout = layout_of(SMALL)
    assert KVLayout.from_json(layout.to_json()) == layout
    other = layout_of(SMALL, kv_format="bf16", index_format="bf16")
    assert other.fingerprint() != layout.fingerprint()
    assert "kv_format" in layout.differences(other)


def test_formats_that_do_not_fit_the_model_are_refused() -> None:
    for engine in ({"kv_format": "fp8"}, {"kv_format": "bf16", "index_format": "fp4"}):
        with pytest.raises(ConfigError, match="use bf16 or fp32"):
            layout_of(TINY, **engine)


def test_views_of_layers_do_not_overlap_and_cover_their_bytes() -> None:
    model = ModelConfig.from_dict(SMALL)
    caches = ModelCaches(Arena(layout_of(SMALL), 2, 2), model)
    tensors = []
    for cache in caches.layers:
        pools = [pool for pool in (cache.window, cache.entries, cache.index_keys) if pool is not None]
        tensors += [tensor for pool in pools for tensor in (pool.data, pool.scale)]
        tensors += [tensor.view(torch.uint8) for tensor in (cache.ring, cache.index_ring, cache.state) if tensor is not None]
    for tensor in tensors:
        assert not tensor.any(), "an earlier view reaches into this one"
        tensor.fill_(1)
    written = int(caches.arena.pages.sum()) + int(caches.arena.slots.sum())
    assert written == sum(tensor.numel() for tensor in tensors)


def test_a_cleared_slot_forgets_its_last_owner() -> None:
    caches = ModelCaches(Arena(layout_of(SMALL), 1, 2), ModelConfig.from_dict(SMALL))
    caches.clear_slot(1)
    clean = caches.arena.slots[1].clone()
    caches.arena.slots[1].random_(0, 256)
    caches.clear_slot(1)
    assert torch.equal(caches.arena.slots[1], clean)

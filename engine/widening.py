"""Memory that a prefill rank has to spare goes into experts: as many layers' as fit are kept as FP8, the form of the products of a chunk.

MXFP4 takes half the bytes, and is widened in each step anew; its values are exact in FP8 (deepseek_v4.md, 4.2), so no result changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from core.errors import ConfigError
from core.kv_layout import PAGE_TOKENS
from engine.memory_plan import available_bytes

if TYPE_CHECKING:
    from engine.engine import LoadedModel

AS_MANY_AS_FIT = -1


@dataclass(frozen=True, slots=True)
class Layer:
    more_bytes: int
    """That its experts take once they are widened."""
    bytes_now: int
    """That go when the wide ones are there."""


def num_fitting(layers: Sequence[Layer], free_bytes: int, reserved_bytes: int) -> int:
    """How many of the layers, from the first, can be widened one after the other so that `reserved_bytes`, which nobody uses meanwhile,
    stay free in the end."""
    number = 0
    for layer in layers:
        free_bytes -= layer.more_bytes
        if free_bytes < max(reserved_bytes, layer.bytes_now):
            break
        number += 1
    return number


def widen_experts(loaded: LoadedModel, wanted: int, num_pages: int, num_slots: int, workspace_bytes: int) -> bool:
    """Widen the experts of `wanted` layers (AS_MANY_AS_FIT: the number is the same on all ranks of a group), beside `num_pages` pages (0:
    the most that the slots' sequences can fill), slots and workspace. Collective. Returns whether any layer was widened. Raises ConfigError
    if `wanted` cannot be, or do not fit."""
    layers = [Layer(moe.widening_bytes or 0, moe.experts_bytes) for moe in loaded.network.widenable()]
    pages = num_pages or num_slots * -(-loaded.engine.max_model_len // PAGE_TOKENS)
    reserved = workspace_bytes + pages * loaded.layout.page_bytes + num_slots * loaded.layout.slot_bytes
    free = available_bytes(loaded.device)
    fitting = 0 if free is None else num_fitting(layers, free, reserved)
    if loaded.share is not None:
        fitting = loaded.share.least("layers to widen", fitting)
    if fitting < wanted <= len(layers):
        raise ConfigError(f"prefill.widened_layers is {wanted}: beside {pages} pages, {num_slots} slots and the largest step {fitting} fit")
    loaded.network.widen(fitting if wanted == AS_MANY_AS_FIT else wanted)
    return loaded.network.num_widened > 0

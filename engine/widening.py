"""Memory that a rank has to spare goes into larger forms of weights, equal in value, so that no result changes.

On a prefill rank these are experts: as many layers' as fit are kept as FP8, the form of the products of a chunk. MXFP4 takes half the
bytes, and is widened in each step anew; its values are exact in FP8 (deepseek_v4.md, 4.2). On a rank with decode steps of many sequences
it is wo_a, which is kept in bf16 beside FP8.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from core.errors import ConfigError
from core.kv_layout import PAGE_TOKENS
from engine.memory_plan import available_bytes
from engine.ops.grouped_linear import FEW_TOKENS

if TYPE_CHECKING:
    from engine.engine import LoadedModel

AS_MANY_AS_FIT = -1
PAGES_SHARE = 8
"""Of the memory that pages could have, wo_a in bf16 takes no more than this part, where num_pages leaves their number open."""


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


def widen_outputs(loaded: LoadedModel, max_decode: int, num_pages: int, num_slots: int, workspace_bytes: int) -> None:
    """Keep wo_a in bf16 beside FP8 if decode steps may have more than FEW_TOKENS sequences, and if it fits beside `num_pages` pages (0: in
    an eighth of what they could have), slots and workspace on all ranks of the group. Collective; `wide_outputs` of the
    network says what became of it."""
    wanted = loaded.network.outputs_widening_bytes()
    if max_decode <= FEW_TOKENS or not wanted:
        return
    free = available_bytes(loaded.device)
    room = (free or 0) - workspace_bytes - num_pages * loaded.layout.page_bytes - num_slots * loaded.layout.slot_bytes
    fits = wanted <= (room if num_pages else room // PAGES_SHARE)
    if loaded.share is not None:
        fits = loaded.share.least("room for wide outputs", int(fits)) > 0
    loaded.network.widen_outputs(fits)

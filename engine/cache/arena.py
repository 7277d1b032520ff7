"""Arena: the memory of all pages and slots of one rank, and typed views of it, layer by layer.

Both are page-major: `pages[i]` and `slots[i]` are contiguous over all layers; a layer's pool is a strided view. Nothing is ever
copied to be looked at, and the two byte tensors are what the transfer layer registers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from core.kv_layout import Field, KVLayout
from engine.cache.fabric_memory import fabric_zeros
from engine.cache.rows import RowFormat, index_rows, kv_rows
from engine.config import ModelConfig

NEUTRAL_SCORE = torch.finfo(torch.float32).min
"""Score of a row that must not weigh in a softmax: exp underflows to 0 without the NaNs that -inf brings."""


@dataclass(frozen=True, slots=True)
class RowPool:
    """Rows of one layer: unit u (a page or a slot), row r."""

    form: RowFormat
    data: torch.Tensor
    """uint8 [units, R, data_bytes], strided."""
    scale: torch.Tensor
    """uint8 [units, R, scale_bytes], strided."""

    def write(self, units_N: torch.Tensor, rows_N: torch.Tensor, x_ND: torch.Tensor) -> None:
        """Encode x and store row i at (units[i], rows[i])."""
        data, scale = self.form.encode(x_ND)
        self.data[units_N, rows_N] = data
        if self.form.scale_bytes:
            self.scale[units_N, rows_N] = scale

    def read(self, units: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """[..., D] in the format's dtype, for broadcastable index tensors."""
        return self.form.decode(self.data[units, rows], self.scale[units, rows])


@dataclass(frozen=True, slots=True)
class LayerCache:
    window: RowPool
    """Per slot: 128 rows, position mod 128."""
    entries: RowPool | None
    """Per page: 64 (ratio 4) or 2 (ratio 128) rows."""
    index_keys: RowPool | None
    """Per page: 64 rows (ratio 4)."""
    ring: torch.Tensor | None
    """float32 [slots, 8, 4, D]: kv A, kv B, score A, score B of position mod 8 (ratio 4; scores include ape)."""
    index_ring: torch.Tensor | None
    """The same for the indexer's compressor, [slots, 8, 4, index_head_dim]."""
    state: torch.Tensor | None
    """float32 [slots, 3, D]: running maximum, sum, weighted sum of the open block (ratio 128)."""


class Arena:
    """Owner of the bytes. `pages` uint8 [num_pages, page_bytes] and `slots` uint8 [num_slots, slot_bytes] are contiguous and live
    as long as the process: they are registered with the transport once and never freed."""

    def __init__(
        self, layout: KVLayout, num_pages: int, num_slots: int, device: torch.device | str = "cpu", *, in_fabric: bool = False
    ) -> None:
        """in_fabric: see fabric_memory.py, and what it raises."""
        self.layout = layout

        def zeros(count: int, num_bytes: int) -> torch.Tensor:
            if in_fabric:
                return fabric_zeros(count, num_bytes, torch.device(device))
            return torch.zeros(count, num_bytes, dtype=torch.uint8, device=device)

        self.pages, self.slots = zeros(num_pages, layout.page_bytes), zeros(num_slots, layout.slot_bytes)


class ModelCaches:
    """The views of an arena that a model's layers read and write."""

    def __init__(self, arena: Arena, model: ModelConfig) -> None:
        self.arena = arena
        layout = arena.layout
        kv = kv_rows(layout.kv_format, model.head_dim, model.qk_rope_head_dim)
        index = index_rows(layout.index_format, model.index_head_dim)
        in_page = {field.name: field for field in layout.page_fields}
        in_slot = {field.name: field for field in layout.slot_fields}

        def pool(memory: torch.Tensor, field: Field | None, form: RowFormat) -> RowPool | None:
            if field is None:
                return None
            split = field.offset + field.rows * form.data_bytes
            end = split + field.rows * form.scale_bytes
            return RowPool(
                form,
                memory[:, field.offset : split].unflatten(1, (field.rows, form.data_bytes)),
                memory[:, split:end].unflatten(1, (field.rows, form.scale_bytes))
                if form.scale_bytes
                else memory[:, :0].unsqueeze(1).expand(-1, field.rows, -1),
            )

        def floats(field: Field | None, shape: tuple[int, ...]) -> torch.Tensor | None:
            if field is None:
                return None
            end = field.offset + field.rows * field.row_bytes
            return arena.slots[:, field.offset : end].view(torch.float32).unflatten(1, shape)

        self.layers: list[LayerCache] = []
        for layer in range(model.num_hidden_layers):
            window = pool(arena.slots, in_slot[f"window.{layer}"], kv)
            assert window is not None
            self.layers.append(
                LayerCache(
                    window=window,
                    entries=pool(arena.pages, in_page.get(f"c4_kv.{layer}") or in_page.get(f"c128_kv.{layer}"), kv),
                    index_keys=pool(arena.pages, in_page.get(f"index.{layer}"), index),
                    ring=floats(in_slot.get(f"c4_ring.{layer}"), (8, 4, model.head_dim)),
                    index_ring=floats(in_slot.get(f"index_ring.{layer}"), (8, 4, model.index_head_dim)),
                    state=floats(in_slot.get(f"c128_state.{layer}"), (3, model.head_dim)),
                )
            )

        self._neutral = torch.zeros_like(arena.slots[:1])
        self._neutral_slot(layout, self._neutral)

    @staticmethod
    def _neutral_slot(layout: KVLayout, slot: torch.Tensor) -> None:
        """Set the scores of a zeroed slot, uint8 [1, slot_bytes]: of every ring row, and the running maximum of every state."""
        for field in layout.slot_fields:
            values = slot[:, field.offset : field.offset + field.rows * field.row_bytes].view(torch.float32).unflatten(1, (field.rows, -1))
            if field.name.startswith(("c4_ring", "index_ring")):
                values[..., values.shape[2] // 2 :] = NEUTRAL_SCORE
            elif field.name.startswith("c128_state"):
                values[..., : values.shape[2] // 3] = NEUTRAL_SCORE

    def clear_slot(self, slot_id: int) -> None:
        """Make a slot that of an empty sequence, whatever an earlier owner left: no rows, neutral scores."""
        self.arena.slots[slot_id] = self._neutral[0]

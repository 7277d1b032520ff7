"""Where each layer's rows lie inside a page and a slot (drawn in bytes.md).

page   [ c4_kv of every ratio-4 layer | c128_kv of every ratio-128 layer | index keys of every ratio-4 layer ]
slot   [ window ring of every layer | ratio-4 ring and index ring of every ratio-4 layer | ratio-128 states ]

Every region begins at a multiple of ALIGNMENT bytes, and a page and a slot are multiples of it.
"""

from __future__ import annotations

from core.kv_layout import PAGE_TOKENS, Field, KVLayout
from engine.cache.rows import RowFormat, index_rows, kv_rows
from engine.config import EngineConfig, ModelConfig

ALIGNMENT = 576
"""Bytes; Blackwell's tensor copies want regions and strides of FP8 caches to be multiples of it. 576 = 9 * 64, so cache lines and
16-byte loads are served, too; it costs V4-Flash 0.4 % of a page and 0.3 % of a slot."""

WINDOW_ROWS = 128
C4_ROWS_PER_PAGE = PAGE_TOKENS // 4
C128_ROWS_PER_PAGE = PAGE_TOKENS // 128
RING_ROWS = 8
"""Rows of a ratio-4 ring: the four of the last closed block and the pending ones, at position mod 8."""


class _Map:
    """Appends regions one after the other, each padded to ALIGNMENT."""

    def __init__(self) -> None:
        self.fields: list[Field] = []
        self.end = 0

    def add(self, name: str, rows: int, row_bytes: int) -> None:
        num_bytes = -(-rows * row_bytes // ALIGNMENT) * ALIGNMENT
        self.fields.append(Field(name=name, offset=self.end, num_bytes=num_bytes, rows=rows, row_bytes=row_bytes))
        self.end += num_bytes


def _row_bytes(form: RowFormat) -> int:
    return form.data_bytes + form.scale_bytes


def build_layout(model: ModelConfig, engine: EngineConfig, model_name: str) -> KVLayout:
    """The byte maps for this model in these formats. Raises ConfigError if a format does not fit the model's dims."""
    kv_bytes = _row_bytes(kv_rows(engine.kv_format, model.head_dim, model.qk_rope_head_dim))
    index_bytes = _row_bytes(index_rows(engine.index_format, model.index_head_dim))
    by_ratio = {ratio: [i for i, r in enumerate(model.compress_ratios) if r == ratio] for ratio in (4, 128)}
    page, slot = _Map(), _Map()
    for layer in by_ratio[4]:
        page.add(f"c4_kv.{layer}", C4_ROWS_PER_PAGE, kv_bytes)
    for layer in by_ratio[128]:
        page.add(f"c128_kv.{layer}", C128_ROWS_PER_PAGE, kv_bytes)
    for layer in by_ratio[4]:
        page.add(f"index.{layer}", C4_ROWS_PER_PAGE, index_bytes)
    for layer in range(model.num_hidden_layers):
        slot.add(f"window.{layer}", WINDOW_ROWS, kv_bytes)
    for layer in by_ratio[4]:
        slot.add(f"c4_ring.{layer}", RING_ROWS, 4 * model.head_dim * 4)
        slot.add(f"index_ring.{layer}", RING_ROWS, 4 * model.index_head_dim * 4)
    for layer in by_ratio[128]:
        slot.add(f"c128_state.{layer}", 1, 3 * model.head_dim * 4)
    return KVLayout(
        model=model_name,
        kv_format=engine.kv_format,
        index_format=engine.index_format,
        page_bytes=max(page.end, ALIGNMENT),
        slot_bytes=slot.end,
        page_fields=tuple(page.fields),
        slot_fields=tuple(slot.fields),
    )

"""KVLayout: everything that a sender's and a receiver's memory must have equal before a byte moves between them.

`engine/cache/layout.py` builds one from a model's shape; `kv_transfer` compares fingerprints and otherwise sees only
pages and slots of bytes. A page is one contiguous run over all layers, and so is a slot.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass

PAGE_TOKENS = 256
"""Tokens covered by one page."""

WIRE_VERSION = 5
"""Raised whenever the meaning of any byte of a page, slot or transfer message changes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Field:
    """One pool's part of a page or slot: `rows` rows of `row_bytes`, starting at `offset` bytes."""

    name: str
    """"<pool>.<layer>", e.g. "c4_kv.2", "index.2", "c128_kv.3" in pages; "window.0", "c4_ring.2", "c128_state.3" in slots."""
    offset: int
    num_bytes: int
    """Bytes of the region, padding included."""
    rows: int
    row_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class KVLayout:
    model: str
    """Name and content hash of the checkpoint: equal shapes with other weights must not be paired."""
    kv_format: str
    """Row format of window and compressed entries: "fp8" (584 B at head_dim 512), "bf16" or "fp32"."""
    index_format: str
    """Row format of index keys: "fp8", "fp4", "bf16" or "fp32"."""
    page_bytes: int
    slot_bytes: int
    page_fields: tuple[Field, ...]
    slot_fields: tuple[Field, ...]
    page_tokens: int = PAGE_TOKENS
    wire_version: int = WIRE_VERSION

    def fingerprint(self) -> str:
        """16 hex digits over all fields; equal layouts have equal ones."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))

    @staticmethod
    def from_json(text: str) -> KVLayout:
        """Raises ValueError, TypeError or KeyError for a text that `to_json` has not made."""
        raw = json.loads(text)
        for key in ("page_fields", "slot_fields"):
            raw[key] = tuple(Field(**field) for field in raw[key])
        return KVLayout(**raw)

    def differences(self, other: KVLayout) -> str:
        """One line naming each field that differs, for the refusal of a peer."""
        mine, theirs = asdict(self), asdict(other)
        parts = []
        for key in mine:
            if mine[key] == theirs[key]:
                continue
            if key.endswith("_fields"):
                names = {f["name"] for f in mine[key]} ^ {f["name"] for f in theirs[key]}
                parts.append(f"{key}: " + (f"only one side has {sorted(names)[:4]}" if names else "offsets or sizes differ"))
            else:
                parts.append(f"{key}: {mine[key]!r} here, {theirs[key]!r} there")
        return "; ".join(parts) or "none"

    def num_pages(self, num_tokens: int) -> int:
        """Pages that a sequence of this many tokens needs."""
        return -(-num_tokens // self.page_tokens)

"""What a page of tokens is called: a digest of it and of everything before it, so that equal names mean equal states."""

from __future__ import annotations

import array
import hashlib
from collections.abc import Sequence

from core.kv_layout import PAGE_TOKENS

DIGEST_BYTES = 16


def page_digests(token_ids: Sequence[int]) -> list[bytes]:
    """One for each whole page of the tokens, in order. The partial page at the end has none: it will change."""
    packed = array.array("I", token_ids[: len(token_ids) // PAGE_TOKENS * PAGE_TOKENS]).tobytes()
    page_bytes, before, digests = 4 * PAGE_TOKENS, b"", list[bytes]()
    for start in range(0, len(packed), page_bytes):
        before = hashlib.blake2b(before + packed[start : start + page_bytes], digest_size=DIGEST_BYTES).digest()
        digests.append(before)
    return digests

"""Which decode rank ran the earlier turn of a conversation, and may still hold its pages. A guess: the rank itself says what it has."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from core.prefix import page_digests
from core.request import MemberKey

MAX_PROMPTS = 16_384
"""Remembered prompts: a few megabytes."""


class PrefixIndex:
    def __init__(self, max_prompts: int = MAX_PROMPTS) -> None:
        self._max_prompts = max_prompts
        self._ranks: OrderedDict[bytes, tuple[MemberKey, int]] = OrderedDict()
        """Digest of a prompt's last whole page -> who ran it, and its number of pages."""

    def note(self, token_ids: Sequence[int], rank: MemberKey) -> None:
        """The rank has run this prompt to its end."""
        digests = page_digests(token_ids)
        if digests:
            self._ranks[digests[-1]] = rank, len(digests)
            self._ranks.move_to_end(digests[-1])
            if len(self._ranks) > self._max_prompts:
                self._ranks.popitem(last=False)

    def find(self, token_ids: Sequence[int]) -> tuple[MemberKey, float] | None:
        """The rank that ran the longest known beginning of this prompt, and that beginning's share of its whole pages."""
        digests = page_digests(token_ids) if self._ranks else []
        for digest in reversed(digests):
            found = self._ranks.get(digest)
            if found is not None:
                return found[0], found[1] / len(digests)
        return None

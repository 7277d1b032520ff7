from __future__ import annotations

from core.kv_layout import PAGE_TOKENS
from core.prefix import page_digests


def test_equal_beginnings_have_equal_names_and_the_partial_page_has_none() -> None:
    tokens = list(range(3 * PAGE_TOKENS))
    first = page_digests(tokens[: 2 * PAGE_TOKENS + 9])
    assert len(first) == 2
    assert page_digests(tuple(tokens))[:2] == first
    assert page_digests(tokens[: PAGE_TOKENS - 1]) == []


def test_a_page_is_named_after_everything_before_it() -> None:
    tokens = [5] * (3 * PAGE_TOKENS)
    changed = [6, *tokens[1:]]
    assert not set(page_digests(tokens)) & set(page_digests(changed))
    assert len(set(page_digests(tokens))) == 3, "equal tokens at another place are another page"

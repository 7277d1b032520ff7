"""The order of the files: those that take longest begin first, or one of them would run alone at the end."""

from __future__ import annotations

import pytest

LONGEST = ("test_chaos", "test_group_cluster", "test_split", "test_cluster", "test_three_hosts", "test_groups", "test_clients")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))

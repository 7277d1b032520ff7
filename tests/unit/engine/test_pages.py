from __future__ import annotations

import random

import pytest

from engine.scheduler.pages import PageAllocator, SlotAllocator


def test_ids_are_given_out_once_and_all_of_them() -> None:
    pages = PageAllocator(5)
    first, second = pages.allocate("a", 2), pages.allocate("b", 3)
    assert first is not None and second is not None
    assert sorted(first + second) == [0, 1, 2, 3, 4]
    assert pages.num_free == 0 and pages.num_pages == 5


def test_a_request_for_too_many_takes_nothing() -> None:
    pages = PageAllocator(3)
    pages.allocate("a", 1)
    assert pages.allocate("b", 3) is None
    assert pages.num_free == 2 and pages.owners() == ("a",)


def test_owner_gets_more_and_gives_all_back() -> None:
    pages = PageAllocator(4)
    mine = (pages.allocate("a", 2) or []) + (pages.allocate("a", 1) or [])
    assert pages.owned_by("a") == tuple(mine)
    assert pages.free("a") == mine
    assert pages.free("a") == []
    assert pages.num_free == 4


def test_rename_hands_everything_over() -> None:
    slots = SlotAllocator(2)
    ids = slots.allocate("r", 1) or []
    slots.rename("r", "quarantine/7")
    assert slots.owned_by("r") == () and slots.owned_by("quarantine/7") == tuple(ids)
    slots.allocate("r", 1)
    with pytest.raises(AssertionError, match="owns ids already"):
        slots.rename("r", "quarantine/7")


def test_integrity_check_finds_a_page_with_two_owners() -> None:
    pages = PageAllocator(3)
    pages.allocate("a", 1)
    pages.check_integrity()
    pages._owned["b"] = list(pages.owned_by("a"))
    with pytest.raises(AssertionError, match="accounted"):
        pages.check_integrity()


def test_no_id_has_two_owners_over_random_events(rng: random.Random) -> None:
    pages = PageAllocator(17)
    model: dict[str, list[int]] = {}
    for _ in range(5000):
        owner = f"r{rng.randrange(8)}"
        event = rng.random()
        if event < 0.5:
            count = rng.randrange(6)
            ids = pages.allocate(owner, count)
            taken = sum(map(len, model.values()))
            assert (ids is None) == (count > 17 - taken)
            if ids is not None:
                model.setdefault(owner, []).extend(ids)
        elif event < 0.9:
            assert sorted(pages.free(owner)) == sorted(model.pop(owner, []))
        else:
            other = f"q{rng.randrange(10**9)}"
            pages.rename(owner, other)
            if owner in model:
                model[other] = model.pop(owner)
        assert {name: tuple(ids) for name, ids in model.items()} == {name: pages.owned_by(name) for name in pages.owners()}
        pages.check_integrity()

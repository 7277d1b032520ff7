from __future__ import annotations

import random

import pytest

from engine.scheduler.pages import PageAllocator, SlotAllocator


def test_ids_are_given_out_once_and_all_of_them() -> None:
    pages = PageAllocator(5)
    first, second = pages.allocate("a", 2), pages.allocate("b", 3)
    assert first is not None and second is not None
    assert sorted(first + second) == [0, 1, 2, 3, 4]
    assert pages.num_free == 0 and pages.num_total == 5


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


def give_back(pages: PageAllocator, owner: str, digests: list[bytes]) -> None:
    pages.holds(owner, digests)
    pages.free(owner)


def test_kept_pages_are_free_and_are_found_again() -> None:
    pages = PageAllocator(5)
    ids = pages.allocate("a", 4) or []
    give_back(pages, "a", [b"1", b"12", b"123"])
    assert (pages.num_free, pages.num_kept) == (5, 3)
    assert pages.claim("b", [b"1", b"12", b"x", b"123"]) == ids[:2], "up to the first gap"
    assert pages.owned_by("b") == tuple(ids[:2])
    assert pages.claim("c", [b"1"]) == [], "a page has one owner"
    pages.check_integrity()


def test_kept_pages_are_given_away_last_and_the_ends_of_prompts_first() -> None:
    pages = PageAllocator(4)
    ids = pages.allocate("a", 3) or []
    give_back(pages, "a", [b"1", b"12"])
    assert sorted(pages.allocate("b", 2) or []) == sorted({0, 1, 2, 3} - set(ids[:2]))
    assert pages.allocate("c", 1) == [ids[1]]
    assert pages.claim("d", [b"1", b"12"]) == [ids[0]]
    assert pages.allocate("e", 1) is None
    pages.check_integrity()


def test_a_request_for_too_many_forgets_no_kept_page() -> None:
    pages = PageAllocator(4)
    pages.allocate("a", 2)
    give_back(pages, "a", [b"1", b"12"])
    assert pages.allocate("b", 5) is None
    assert len(pages.claim("c", [b"1", b"12"])) == 2


def test_of_two_pages_with_one_content_one_is_kept() -> None:
    pages = PageAllocator(2)
    pages.allocate("a", 1)
    pages.allocate("b", 1)
    give_back(pages, "a", [b"1"])
    give_back(pages, "b", [b"1"])
    assert (pages.num_free, pages.num_kept) == (2, 1)
    pages.check_integrity()


def test_a_beginning_that_two_prompts_share_outlives_what_follows_it_whoever_ended_first() -> None:
    pages = PageAllocator(4)
    pages.allocate("short", 1)
    pages.allocate("long", 3)
    give_back(pages, "short", [b"1"])
    give_back(pages, "long", [b"1", b"12", b"123"])
    pages.allocate("other", 2)  # the page whose content is kept already, and another
    assert len(pages.claim("next turn", [b"1", b"12", b"123"])) == 2, "only the end of the long prompt is gone"


def test_any_order_of_keeping_and_claiming_leaves_each_page_with_one_owner(rng: random.Random) -> None:
    pages, owners = PageAllocator(12), dict[str, list[bytes]]()
    for number in range(3000):
        if owners and rng.random() < 0.5:
            owner = rng.choice(list(owners))
            digests = owners.pop(owner)
            give_back(pages, owner, digests if rng.random() < 0.7 else [])
        else:
            name, word = f"r{number}", "".join(rng.choices("ab", k=rng.randint(1, 4)))
            digests = [word[: k + 1].encode() for k in range(len(word))]
            claimed = len(pages.claim(name, digests))
            if pages.allocate(name, len(word) - claimed) is None:
                give_back(pages, name, digests)
            else:
                owners[name] = digests
        pages.check_integrity()
        assert set(pages.owners()) == set(owners)

"""Who owns which page and which slot. Ids only; the bytes are the arena's."""

from __future__ import annotations


class Allocator:
    """Hands out ids 0..count-1; each is free or has exactly one owner (a request id)."""

    def __init__(self, count: int) -> None:
        assert count >= 0, f"{count=}"
        self._count = count
        self._free = list(range(count - 1, -1, -1))
        self._owned: dict[str, list[int]] = {}

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_total(self) -> int:
        return self._count

    def allocate(self, owner: str, count: int) -> list[int] | None:
        """`count` more ids for the owner, lowest first as far as freed order allows; None, and nothing taken, if there are fewer."""
        assert count >= 0, f"{count=}"
        if count > len(self._free):
            return None
        ids = [self._free.pop() for _ in range(count)]
        self._owned.setdefault(owner, []).extend(ids)
        return ids

    def free(self, owner: str) -> list[int]:
        """Take back all of the owner's ids (none if it has none); returns them."""
        ids = self._owned.pop(owner, [])
        self._free.extend(reversed(ids))
        return ids

    def rename(self, old: str, new: str) -> None:
        """Hand everything from one owner to another that owns nothing yet (a reservation that goes into quarantine, say)."""
        assert new not in self._owned, f"{new} owns ids already"
        if old in self._owned:
            self._owned[new] = self._owned.pop(old)

    def owned_by(self, owner: str) -> tuple[int, ...]:
        return tuple(self._owned.get(owner, ()))

    def owners(self) -> tuple[str, ...]:
        return tuple(self._owned)

    def check_integrity(self) -> None:
        """Assert that free and owned ids together are each id exactly once."""
        ids = sorted(self._free + [one for ids in self._owned.values() for one in ids])
        assert ids == list(range(self._count)), f"{type(self).__name__}: {len(ids)} ids accounted for of {self._count}"


class PageAllocator(Allocator):
    """Pages of 256 tokens."""

    @property
    def num_pages(self) -> int:
        return self.num_total


class SlotAllocator(Allocator):
    """Slots, one a sequence."""

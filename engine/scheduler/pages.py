"""Who owns which page and which slot. Ids only; the bytes are the arena's."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Sequence


class Allocator:
    """Hands out ids 0..count-1; each is free or has exactly one owner (a request id)."""

    def __init__(self, count: int) -> None:
        assert count >= 0, f"{count=}"
        self._count = count
        self._ids = list(range(count))
        self._free = self._ids[::-1]
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

    def _free_ids(self) -> list[int]:
        return self._free

    def check_integrity(self) -> None:
        """Assert that free and owned ids together are each id exactly once."""
        ids = sorted(itertools.chain(self._free_ids(), *self._owned.values()))
        assert ids == self._ids, f"{type(self).__name__}: {len(ids)} ids accounted for of {self._count}"


class PageAllocator(Allocator):
    """Pages of 256 tokens. A free page may be kept: it still holds what it held, until it is given to somebody else."""

    def __init__(self, count: int) -> None:
        super().__init__(count)
        self._kept: OrderedDict[bytes, int] = OrderedDict()
        """Digest of what it holds -> free page, the first to be given away first: those after a page of a prompt go before it."""
        self._contents: dict[str, Sequence[bytes]] = {}
        """Owner -> digests of what its first pages hold."""

    @property
    def num_free(self) -> int:
        return len(self._free) + len(self._kept)

    @property
    def num_kept(self) -> int:
        return len(self._kept)

    def allocate(self, owner: str, count: int) -> list[int] | None:
        while len(self._free) < count <= self.num_free:
            self._free.append(self._kept.popitem(last=False)[1])
        return super().allocate(owner, count)

    def claim(self, owner: str, digests: Sequence[bytes]) -> list[int]:
        """Kept pages that hold the first of these contents, as many as there are without a gap; they are the owner's now, its first."""
        ids: list[int] = []
        for digest in digests:
            page = self._kept.pop(digest, None)
            if page is None:
                break
            ids.append(page)
        if ids:
            assert owner not in self._owned, f"{owner} owns pages already"
            self._owned[owner] = list(ids)
            self.holds(owner, digests[: len(ids)])
        return ids

    def holds(self, owner: str, digests: Sequence[bytes]) -> None:
        """The owner's first pages hold these contents, and no others are known: they are kept when it is freed."""
        self._contents[owner] = digests

    def free(self, owner: str) -> list[int]:
        ids = self._owned.pop(owner, [])
        kept = list(zip(self._contents.pop(owner, ()), ids, strict=False))
        self._free.extend(reversed(ids[len(kept) :]))
        for digest, page in reversed(kept):  # a page without those before it is of no use, so the last ones go first
            if digest in self._kept:
                self._kept.move_to_end(digest)
                self._free.append(page)
            else:
                self._kept[digest] = page
        return ids

    def rename(self, old: str, new: str) -> None:
        super().rename(old, new)
        if old in self._contents:
            self._contents[new] = self._contents.pop(old)

    def _free_ids(self) -> list[int]:
        return [*self._free, *self._kept.values()]


class SlotAllocator(Allocator):
    """Slots, one a sequence."""

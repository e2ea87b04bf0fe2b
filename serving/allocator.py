"""Who owns which page of the cache.

Invariants:
- a page is free or has exactly one owner; `free_pages + used_pages == num_pages`;
- the same calls in the same order hand out the same pages (last freed is first reused, which keeps hot pages hot).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable


class OutOfPages(RuntimeError):
    """More pages were asked for than are free. Nothing was allocated."""


class PageError(RuntimeError):
    """A page was freed that its caller doesn't own: a bug in the caller, never the fault of a request."""


class PageAllocator:
    """Hands out pages `0 .. num_pages - 1`, each holding `page_size` tokens, to owners (any hashable value)."""

    def __init__(self, num_pages: int, page_size: int):
        for name, value in (("num_pages", num_pages), ("page_size", page_size)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}; give the cache more room")
        self.num_pages = num_pages
        self.page_size = page_size
        self._free = list(range(num_pages - 1, -1, -1))
        self._owners: list[Hashable | None] = [None] * num_pages

    @property
    def free_pages(self) -> int:
        return len(self._free)

    @property
    def used_pages(self) -> int:
        return self.num_pages - len(self._free)

    def pages_for(self, tokens: int) -> int:
        """How many pages hold `tokens` tokens of one request."""
        return -(-tokens // self.page_size)

    def owner(self, page: int) -> Hashable | None:
        """Who owns `page`; None if it is free."""
        self._check_known(page)
        return self._owners[page]

    def allocate(self, count: int, owner: Hashable) -> list[int]:
        """Gives `count` pages to `owner`, or raises `OutOfPages` and gives none."""
        if owner is None:
            raise PageError("a page's owner can't be None, which marks free pages; pass the request's id")
        if count < 0:
            raise PageError(f"can't allocate {count} pages; ask for 0 or more")
        if count > len(self._free):
            raise OutOfPages(f"{count} pages asked for, {len(self._free)} of {self.num_pages} free; free some first")
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._owners[page] = owner
        return pages

    def free(self, pages: Iterable[int], owner: Hashable) -> None:
        """Takes `pages` back from `owner`, all or none. Raises `PageError` for any that `owner` doesn't hold."""
        pages = list(pages)
        for page in pages:
            self._check_known(page)
            if self._owners[page] != owner or owner is None:
                state = "free" if self._owners[page] is None else f"owned by {self._owners[page]!r}"
                raise PageError(f"{owner!r} can't free page {page}, which is {state}; free only pages you hold, once")
        if len(set(pages)) != len(pages):
            raise PageError(f"{owner!r} frees a page twice in one call: {pages}; list each page once")
        for page in reversed(pages):
            self._owners[page] = None
            self._free.append(page)

    def give(self, page: int, owner: Hashable, to: Hashable) -> None:
        """Makes `to` the owner of a page that `owner` holds."""
        self._check_known(page)
        if self._owners[page] != owner or owner is None or to is None:
            raise PageError(f"{owner!r} can't give page {page} away: its owner is {self._owners[page]!r}")
        self._owners[page] = to

    def _check_known(self, page: int) -> None:
        if not 0 <= page < self.num_pages:
            raise PageError(f"page {page} doesn't exist; pages are 0 to {self.num_pages - 1}")

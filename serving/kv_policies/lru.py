"""The page that nobody has used for the longest time goes first."""

from . import CachedPage


class Policy:
    """`note` is the time of the last use, counted in uses."""

    def __init__(self) -> None:
        self._now = 0

    def used(self, page: CachedPage) -> None:
        self._now += 1
        page.note = self._now

    def priority(self, page: CachedPage) -> float:
        return page.note

    def evicted(self, priority: float) -> None:
        """Time is all that counts."""

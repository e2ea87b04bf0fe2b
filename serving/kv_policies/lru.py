"""The page that nobody has used for the longest time goes first."""

from . import CachedPage, Use


class Policy:
    """One queue."""

    def __init__(self, num_pages: int) -> None:
        """Room makes no difference."""

    def put(self, page: CachedPage) -> None:
        """Nothing is counted."""

    def taken(self, page: CachedPage) -> None:
        """Nothing is counted."""

    def left(self, page: CachedPage, use: Use) -> int:
        return 0

    def worth(self, page: CachedPage) -> float:
        return 0.0

    def evicted(self, page: CachedPage) -> None:
        """Nothing is counted."""

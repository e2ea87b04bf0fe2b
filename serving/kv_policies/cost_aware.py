"""The page goes first that is cheapest to compute again for how often it is used (GreedyDual-Size-Frequency: Cherkasova
1998, HPL-98-69).

A page's cost grows with the pages before it, which its attention reads again. What was not used for long falls behind:
the priority of the last page that went is added to what is used from then on.
"""

from . import CachedPage

# Pages of context after which attention costs as much as all else of a token: about 4,096 tokens of an 8B, in pages of
# 64. Its order of magnitude is what counts.
ATTENTION_PAGES = 64


class Policy:
    """`note` counts uses."""

    def __init__(self) -> None:
        self._level = 0.0

    def used(self, page: CachedPage) -> None:
        page.note += 1

    def priority(self, page: CachedPage) -> float:
        return self._level + page.note * (1 + page.depth / ATTENTION_PAGES)

    def evicted(self, priority: float) -> None:
        self._level = max(self._level, priority)

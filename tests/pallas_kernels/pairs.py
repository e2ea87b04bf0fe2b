"""Sets of options among which every two occur together, each without the other, and both not at all."""

from collections.abc import Sequence
from itertools import compress

FIRST = "++-+++---+-"


def pairs(options: Sequence[str]) -> list[frozenset[str]]:
    """Twelve sets of at most eleven options: Plackett and Burman 1946, doi:10.1093/biomet/33.4.305."""
    assert len(options) <= len(FIRST)
    rows = [FIRST[-shift:] + FIRST[:-shift] for shift in range(len(FIRST))] + ["-" * len(FIRST)]
    return [frozenset(compress(options, (sign == "+" for sign in row))) for row in rows]

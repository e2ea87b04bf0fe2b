"""The page goes first whose going is expected to cost the least: all take as long to compute again, so it is the one
that is least likely to be asked for again soon.

How likely that is, is learned by kinds of pages. What tells most, on traces of real traffic, is how the last request
that used the page ended: documents that are asked short questions are asked again, what was written at length from is
not; then whether it was used again before; and whether it is of a prompt or was generated. For each kind the policy
counts after how long pages were asked for again (as the workload-aware eviction of Wang et al. 2025, arXiv:2506.02634,
does by kinds of requests); pages that went are remembered for that, so that a kind that goes early is not taken for one
that is never asked for. Within a kind the least recently used page goes first. Where kinds do not differ that is LRU.

Time is counted in pages that were put into the cache, and in bins of an eighth of its size. Old counts fade: those of a
kind are halved when they are more than twice the pages of the cache.
"""

from __future__ import annotations

import dataclasses
import itertools

from . import CachedPage, Use

BINS_A_CACHE = 8
BINS = 2 * BINS_A_CACHE  # what is asked for later than that counts as never
SOON = BINS_A_CACHE // 2  # bins
# A kind is believed to be like all others, as if so many of its pages had been.
PRIOR = 50.0
OUTPUTS = 6  # kinds of output lengths, to a factor of four
PREEMPTED, FIRST_KIND = 0, 1
KINDS = FIRST_KIND + 2 * (OUTPUTS + 1)


@dataclasses.dataclass(slots=True)
class Note:
    """Of a page. `uses`: requests that it had. `left_at`: when nobody used it any more; -1 while somebody does."""

    uses: int = 1
    kind: int = -1
    left_at: int = -1


@dataclasses.dataclass(slots=True)
class Kind:
    """`left`: pages that nobody used any more; `again[i]`: those that were asked for in the i-th bin of time after."""

    left: float = 0.0
    again: list[float] = dataclasses.field(default_factory=lambda: [0.0] * BINS)

    def fade(self, most: float) -> None:
        if self.left > most:
            self.left /= 2
            self.again = [count / 2 for count in self.again]


class Policy:
    """See the module."""

    def __init__(self, num_pages: int) -> None:
        self._num_pages, self._bin = num_pages, max(1, num_pages // BINS_A_CACHE)
        self._now = 0
        self._kinds = [Kind() for _ in range(KINDS)]
        self._all = Kind()
        self._went: dict[int, Note] = {}  # by path, the oldest first
        self._worth: list[list[float]] = [[0.0] * (BINS + 1)] * KINDS
        # The table is made anew when so many pages have gone, which makes its cost a constant for each.
        self._every, self._since = max(16, num_pages // 64), 0

    def put(self, page: CachedPage) -> None:
        self._now += 1
        note = self._went.pop(page.path, None)
        page.note = Note() if note is None else note
        if note is not None:
            self._asked_again(note)
        while self._went and self._is_old(next(iter(self._went.values()))):
            del self._went[next(iter(self._went))]

    def taken(self, page: CachedPage) -> None:
        self._asked_again(page.note)

    def left(self, page: CachedPage, use: Use) -> int:
        note: Note = page.note
        note.kind, note.left_at = _kind(page, note, use), self._now
        kind = self._kinds[note.kind]
        kind.left += 1
        self._all.left += 1
        kind.fade(2 * self._num_pages)
        self._all.fade(8 * self._num_pages)
        return note.kind

    def worth(self, page: CachedPage) -> float:
        note: Note = page.note
        return self._worth[note.kind][min((self._now - note.left_at) // self._bin, BINS)]

    def evicted(self, page: CachedPage) -> None:
        self._went[page.path] = page.note
        self._since += 1
        if self._since >= self._every:
            self._since, self._worth = 0, [self._soon(kind) for kind in self._kinds]

    def _asked_again(self, note: Note) -> None:
        note.uses += 1
        if note.left_at < 0:
            return
        if (at := (self._now - note.left_at) // self._bin) < BINS:
            self._kinds[note.kind].again[at] += 1
            self._all.again[at] += 1
        note.left_at = -1

    def _is_old(self, note: Note) -> bool:
        return self._now - note.left_at > BINS * self._bin

    def _soon(self, kind: Kind) -> list[float]:
        """By the bins of time since it was left: the chance that such a page is asked for in the next `SOON` bins."""
        prior = PRIOR / max(self._all.left, 1.0)
        again = [own + prior * every for own, every in zip(kind.again, self._all.again, strict=True)]
        till = [0.0, *itertools.accumulate(again)]  # asked for before each bin
        left = kind.left + PRIOR
        # Counts fade at different times, so that what is left may seem to be less than what comes.
        return [
            (till[min(at + SOON, BINS)] - till[at]) / max(left - till[at], till[BINS] - till[at], 1e-9)
            for at in range(BINS + 1)
        ]


def _kind(page: CachedPage, note: Note, use: Use) -> int:
    if use.preempted:
        return PREEMPTED
    output = min(use.output_tokens.bit_length() // 2, OUTPUTS - 1) if page.depth < use.prompt_pages else OUTPUTS
    return FIRST_KIND + (OUTPUTS + 1) * (note.uses > 1) + output

"""Room in the host's memory for pages of the prefix cache that have to go from the device, those of preempted requests
among them, where copying them there and back is cheaper than computing them again (FastSwitch: Shen et al. 2024,
arXiv:2411.18424; two levels of a prefix cache: Mooncake, Qin et al. 2024, arXiv:2407.00079).

Both rates are measured: what a page takes to copy when the engine warms up, what tokens take to compute in each step.
Here is only decided what is copied; who runs the step does it, by its `Moves`.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .step_times import StepTimes


@dataclasses.dataclass(slots=True, eq=False)
class Moves:
    """What is done before a step, in this order: the pages of `out` are copied to the host, the copies of `back` are
    written to pages, and those of `gone` are forgotten. Copies have numbers that are never used again; `back` may ask
    for one of `out`, and is the end of it."""

    out: dict[int, int] = dataclasses.field(default_factory=dict)  # page by copy
    back: dict[int, int] = dataclasses.field(default_factory=dict)  # page by copy
    gone: list[int] = dataclasses.field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.out or self.back or self.gone)


class HostPages:
    """`most`: pages there is room for. `used`: those that are kept. `page_seconds`: that one takes to copy, there or
    back. `copied_out`, `copied_back`: pages that were, since the start."""

    def __init__(self, most: int, page_size: int, times: StepTimes):
        self.most, self.used, self.page_seconds = most, 0, 0.0
        self.copied_out = self.copied_back = 0
        self._page_size, self._times = page_size, times
        self._moves = Moves()
        self._numbers = itertools.count()

    def is_worth(self, depth: int) -> bool:
        """Whether to copy the page that comes after so many others there and back, rather than to compute it again,
        which is done in chunks of the largest size. True while no such step has been seen."""
        if not self.most:
            return False
        rows, chunk = size = self._times.sizes[-1]
        step = self._times.seconds(size, chunk * (depth + 0.5) * self._page_size)
        return step is None or 2 * self.page_seconds <= step / chunk * self._page_size

    def keep(self, page: int) -> int:
        """Of a page as it is before the next step; the copy's number. There must be room."""
        assert self.used < self.most
        copy = next(self._numbers)
        self._moves.out[copy] = page
        self.used += 1
        self.copied_out += 1
        return copy

    def bring_back(self, copy: int, page: int) -> None:
        """Before the next step, to `page`. The copy is given up."""
        self._moves.back[copy] = page
        self.used -= 1
        self.copied_back += 1

    def drop(self, copy: int) -> None:
        """Forgets it."""
        self.used -= 1
        if self._moves.out.pop(copy, None) is None:
            self._moves.gone.append(copy)
        else:
            self.copied_out -= 1

    def take_moves(self) -> Moves:
        """What is to be done since the last plan."""
        moves, self._moves = self._moves, Moves()
        return moves

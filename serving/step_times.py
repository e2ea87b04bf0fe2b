"""How long a step takes, learned from those that ran: the cost model of policies and of preemption.

A step is padded to one of a few sizes (`step_sizes`), which decides most of its time; the rest grows with the pairs of
tokens that attend to each other. So each size has a line, seconds = a + b * pairs, by least squares over its latest
steps: an old one counts less and less.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass

from .step_plan import StepPlan

Size = tuple[int, int]

KEPT = 0.98  # of a step's weight, each time another one of its size is seen: the latest 50 count
# One that took longer than expected by more than this factor (the machine was busy) counts as this factor.
MOST_SURPRISE = 4.0
STEPS_BEFORE_SURPRISE = 3
# A size that was passed over as too slow is believed so much less each time, so that it is tried again some day.
DOUBT = 0.998


@dataclass(slots=True)
class Line:
    """Sums over weighted observations of (x, y)."""

    weight: float = 0.0
    x: float = 0.0
    y: float = 0.0
    xx: float = 0.0
    xy: float = 0.0

    def add(self, x: float, y: float) -> None:
        self.weight = self.weight * KEPT + 1
        self.x = self.x * KEPT + x
        self.y = self.y * KEPT + y
        self.xx = self.xx * KEPT + x * x
        self.xy = self.xy * KEPT + x * y

    @property
    def slope(self) -> float:
        """0 where the observations do not tell, or say that more work takes less time."""
        spread = self.xx - self.x * self.x / self.weight
        if spread <= 1e-9 * self.xx:
            return 0.0
        return max(0.0, (self.xy - self.x * self.y / self.weight) / spread)

    def at(self, x: float) -> float:
        """Never below 0."""
        return max(0.0, self.y / self.weight + self.slope * (x - self.x / self.weight))


class StepTimes:
    """See the module. `sizes`: (request rows, chunk tokens), cheapest first."""

    def __init__(self, sizes: list[Size]):
        self.sizes = sizes
        self.lines = {size: Line() for size in sizes}
        self._trust = dict.fromkeys(sizes, 1.0)

    def size_of(self, rows: int, chunk: int) -> Size:
        """What a step of so many request rows and chunk tokens is padded to."""
        return next(size for size in self.sizes if size[0] >= rows and size[1] >= chunk)

    def observe(self, plan: StepPlan, seconds: float) -> None:
        """`plan` took so long, from the end of the step before it."""
        self.add(self.size_of(plan.rows, plan.chunk_tokens), plan.pairs, seconds)

    def add(self, size: Size, pairs: float, seconds: float) -> None:
        line = self.lines[size]
        if line.weight >= STEPS_BEFORE_SURPRISE:
            seconds = min(seconds, MOST_SURPRISE * line.at(pairs))
        line.add(pairs, seconds)
        self._trust[size] = 1.0

    def seconds(self, size: Size, pairs: float) -> float | None:
        """Of a step of that size; None while none has been seen that it could be told from: one of a smaller size, or
        of a larger, and both with prompts or both without."""
        line = self.lines[size]
        if line.weight:
            return line.at(pairs) * self._trust[size]
        known = [other for other in self.sizes if self.lines[other].weight and bool(other[1]) == bool(size[1])]
        if not known:
            return None
        # The next smaller one, as often as it has fewer rows; without one the smallest that is known.
        like = known[max(0, bisect.bisect(known, size) - 1)]
        times = max(1.0, sum(size) / sum(like))
        return self.lines[like].at(pairs / times) * times * self._trust[size]

    def most_tokens(self, plan: StepPlan, before: int, most: int, seconds: float) -> int:
        """Prompt tokens that fit a step beside the decodes of `plan` so that it stays within `seconds`; `before` those
        come so many tokens of the same prompt.

        Fewer than a size holds take as long, so it is the tokens of a size, or `most` if that is less. Of the smallest
        size at least: prompts never stand still.
        """
        chosen, pairs = 0, plan.pairs
        for size in self.sizes:
            if not (chunk := size[1]):
                continue
            expected = self.seconds(size, pairs + chunk * before + chunk * chunk // 2)
            if chosen and expected is not None and expected > seconds:
                self._trust[size] *= DOUBT
                break
            chosen = chunk
            if chosen >= most:
                break
        return min(most, chosen)

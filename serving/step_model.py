"""How long steps take on a machine, measured once: the simulator's device.

For each size that steps are padded to (`step_sizes`), seconds = fixed + per_pair * pairs + per_row * rows, by least
squares, where pairs are those of tokens that attend to each other, and rows those of requests: the host's work for each
shows, too. What is left, a step's surprise, is no noise around nothing: it makes the slow steps that clients see, and
comes in stretches. So the surprises are kept as they came, and the simulator takes one after another.
"""

from __future__ import annotations

import bisect
import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from .step_times import Size

# One that took so many times the median of its size is left out: the machine was stopped meanwhile.
STOPPED = 20.0
TERMS = 3


@dataclasses.dataclass(frozen=True, slots=True)
class TimedStep:
    """A step of a real engine. `size`: it was padded to; `rows`: requests that were in it."""

    size: Size
    rows: int
    pairs: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class StepModel:
    """See the module.

    Attributes:
        lines: (fixed, per_pair, per_row) in seconds, by size.
        surprises: steps' times by what the lines say, in the order in which they ran.
        start: seconds from when an idle engine gets work until its step is on the device.
    """

    lines: dict[Size, tuple[float, float, float]]
    surprises: tuple[float, ...] = (1.0,)
    start: float = 0.0

    @classmethod
    def fit(cls, steps: Sequence[TimedStep], start: float = 0.0) -> StepModel:
        """From steps in the order in which they ran."""
        lines, kept = {}, set()
        for size in sorted({step.size for step in steps}):
            numbers = [number for number, step in enumerate(steps) if step.size == size]
            most = STOPPED * statistics.median(steps[number].seconds for number in numbers)
            numbers = [number for number in numbers if steps[number].seconds <= most]
            lines[size] = _line([steps[number] for number in numbers])
            kept |= set(numbers)
        model = cls(lines, (), start)
        left = [steps[number] for number in sorted(kept)]
        surprises = [step.seconds / model.seconds(step.size, step.rows, step.pairs) for step in left]
        return dataclasses.replace(model, surprises=tuple(surprises))

    def seconds(self, size: Size, rows: int, pairs: float) -> float:
        """Of a step in the mean. One of a size that was not measured is between its neighbours by its rows of tokens,
        or in proportion to the nearest. Raises ValueError where none was measured with prompts, or none without."""
        line = self.lines.get(size)
        if line is not None:
            return _at(line, rows, pairs)
        known = sorted((sum(other), other) for other in self.lines if bool(other[1]) == bool(size[1]))
        if not known:
            raise ValueError(f"no step of {size[0]} rows and {size[1]} prompt tokens was timed; time one")
        wanted = sum(size)
        at = bisect.bisect(known, (wanted,))
        if at == 0:
            return _at(self.lines[known[0][1]], rows, pairs)
        below, other = known[at - 1]
        low = _at(self.lines[other], rows, pairs)
        if at == len(known):
            return low * wanted / below
        above, other = known[at]
        high = _at(self.lines[other], rows, pairs)
        return low + (high - low) * (wanted - below) / (above - below)

    def to_json(self) -> dict[str, Any]:
        lines = [{"rows": size[0], "chunk": size[1], "seconds": line} for size, line in self.lines.items()]
        return {"lines": lines, "surprises": [round(one, 3) for one in self.surprises], "start": self.start}

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> StepModel:
        lines = {(one["rows"], one["chunk"]): tuple(one["seconds"]) for one in found["lines"]}
        return cls(lines, tuple(found["surprises"]), found["start"])


def _at(line: tuple[float, float, float], rows: int, pairs: float) -> float:
    return max(1e-6, line[0] + line[1] * pairs + line[2] * rows)


def _line(steps: list[TimedStep]) -> tuple[float, float, float]:
    """By least squares, of terms that vary and do not say that more work takes less time."""
    terms_SC = np.array([[1.0, step.pairs, step.rows] for step in steps])  # steps, coefficients
    seconds_S = np.array([step.seconds for step in steps])
    scale_C = np.maximum(terms_SC.max(0), 1e-9)
    used = [0, *(at for at in range(1, TERMS) if np.ptp(terms_SC[:, at]) > 1e-3 * scale_C[at])]
    while True:
        found, *_ = np.linalg.lstsq(terms_SC[:, used] / scale_C[used], seconds_S, rcond=None)
        negative = [at for at, value in zip(used[1:], found[1:], strict=True) if value < 0]
        if not negative:
            break
        used.remove(negative[-1])
    line = [0.0] * TERMS
    for at, value in zip(used, found, strict=True):
        line[at] = float(value / scale_C[at])
    return line[0], line[1], line[2]

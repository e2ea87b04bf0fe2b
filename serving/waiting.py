"""The queue of requests that wait, for policies in which a request keeps its rank for as long as it lives.

A heap, so that a step costs the logarithm of the queue's length for each request that it lets in, and nothing for those
that stay. One that is gone from the queue is passed over when it comes to the head.

Nobody starves as long as a policy's keys grow without bound with the requests that come or are let in: then only
finitely many can ever rank before a given one.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator

from .step_plan import Sequence, StepPlan
from .step_times import StepTimes


class Heap:
    """Sequences by rank, of which any may be dropped: it stays where it is, and is passed over."""

    def __init__(self) -> None:
        # (key, number, ticket, sequence): the ticket says whether the entry still stands.
        self._heap: list[tuple[float, int, int, Sequence]] = []
        self._tickets: dict[Sequence, int] = {}
        self._next = itertools.count()

    def __len__(self) -> int:
        return len(self._tickets)

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence in self._tickets

    def __iter__(self) -> Iterator[Sequence]:
        return (entry[-1] for entry in sorted(self._heap) if self._stands(entry))

    def push(self, sequence: Sequence) -> None:
        ticket = self._tickets[sequence] = next(self._next)
        heapq.heappush(self._heap, (*sequence.rank, ticket, sequence))

    def first(self) -> Sequence | None:
        while self._heap and not self._stands(self._heap[0]):
            heapq.heappop(self._heap)
        return self._heap[0][-1] if self._heap else None

    def drop(self, sequence: Sequence) -> None:
        del self._tickets[sequence]
        if len(self._heap) > 64 + 2 * len(self._tickets):
            self._heap = [entry for entry in self._heap if self._stands(entry)]
            heapq.heapify(self._heap)

    def _stands(self, entry: tuple[float, int, int, Sequence]) -> bool:
        return self._tickets.get(entry[-1]) == entry[2]


class Waiting:
    """First come, first served. A policy overrides `key`, and what else it decides (`schedulers.Policy` says what).

    `let_in_total` counts the requests that have been let in: a clock for keys that age.
    """

    moves = False
    honours: tuple[str, ...] = ()

    def __init__(self, times: StepTimes, max_token_ms: float | None):
        self.times = times
        self.most_seconds = None if max_token_ms is None else max_token_ms / 1e3
        self.let_in_total = 0
        self._queue = Heap()

    def __len__(self) -> int:
        return len(self._queue)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._queue)

    def key(self, sequence: Sequence) -> float:
        """Asked once, when it comes: the least goes first, and among equals the one that came first."""
        return 0.0

    def rank(self, sequence: Sequence) -> tuple[float, int]:
        return sequence.rank

    def add(self, sequence: Sequence) -> None:
        if not sequence.preemptions:
            sequence.rank = (self.key(sequence), sequence.number)
        self._queue.push(sequence)

    def first(self, budget: int) -> Sequence | None:
        return self._queue.first()

    def let_in(self, sequence: Sequence) -> None:
        self._queue.drop(sequence)
        self.let_in_total += not sequence.preemptions

    def ended(self, sequence: Sequence, complete: bool) -> None:
        if sequence.slot < 0:
            self._queue.drop(sequence)

    def gives_way(self, runs: Sequence, waits: Sequence) -> bool:
        return False

    def budget(self, plan: StepPlan, before: int, most: int) -> int:
        seconds = self.most_seconds
        return most if seconds is None or not plan.decodes else self.times.most_tokens(plan, before, most, seconds)

    def planned(self, plan: StepPlan) -> None:
        """Nothing is counted."""

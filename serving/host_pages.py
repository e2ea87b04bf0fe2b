"""Room in the host's memory for the pages of preempted requests, where copying them there and back is cheaper than
computing them again (FastSwitch: Shen et al. 2024, arXiv:2411.18424).

Both rates are measured: what a page takes to copy when the engine warms up, what tokens take to compute in each step.
With a prefix cache a preempted request's pages are also kept on the device for as long as nobody needs their room.
"""

from __future__ import annotations

import math

from .step_plan import Sequence
from .step_times import StepTimes


class HostPages:
    """`most`: pages there is room for. `page_seconds`: that one takes to copy, there or back.

    `copied_out`, `copied_back`: pages that were, since the start. Invariant: `used` is the sum of `host_pages` of the
    requests that wait.
    """

    def __init__(self, most: int, page_size: int, times: StepTimes):
        self.most, self.used, self.page_seconds = most, 0, 0.0
        self.copied_out = self.copied_back = 0
        self._page_size, self._times = page_size, times

    def take(self, sequence: Sequence) -> bool:
        """Keeps the pages of one that loses its slot, if that is worth it and there is room. What a request asks that
        has to see its tokens computed cannot be kept so."""
        count, request = -(-sequence.num_scheduled // self._page_size), sequence.request
        if not count or self.used + count > self.most or not request.finds_prefixes or request.counts_output:
            return False
        if 2 * count * self.page_seconds > self._compute_seconds(sequence.num_scheduled):
            return False
        sequence.host_pages, sequence.host_tokens = count, sequence.num_scheduled
        self.used += count
        self.copied_out += count
        return True

    def give_back(self, sequence: Sequence) -> None:
        """It is let in again, or gone."""
        self.used -= sequence.host_pages
        sequence.host_pages = sequence.host_tokens = 0

    def _compute_seconds(self, tokens: int) -> float:
        """As chunks of the largest size; without end while no such step has been seen."""
        size = self._times.sizes[-1]
        step = self._times.seconds(size, size[1] * tokens / 2)
        return math.inf if step is None else tokens / size[1] * step

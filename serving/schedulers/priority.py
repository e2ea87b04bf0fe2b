"""Requests with a lower `priority` go first, and take the places of those with a higher one that run.

A level of priority is worth `AGE` requests: one that has seen so many let in since it came goes before newcomers of the
level below it. So nobody starves: a request of level p waits for those in the queue when it came, and for newcomers of
lower levels only while fewer than (p - lowest level) * AGE have been let in.
"""

from ..step_plan import Sequence
from ..waiting import Waiting

AGE = 1024


class Policy(Waiting):
    """See the module."""

    honours = ("priority",)

    def key(self, sequence: Sequence) -> float:
        return self.let_in_total + AGE * sequence.request.priority

    def gives_way(self, runs: Sequence, waits: Sequence) -> bool:
        return runs.request.priority > waits.request.priority and runs.rank > waits.rank

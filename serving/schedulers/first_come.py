"""First come, first served: nobody is let in before one that came earlier, and the youngest is preempted."""

from ..waiting import Waiting


class Policy(Waiting):
    """All keys are the same, so the order is that in which requests came."""

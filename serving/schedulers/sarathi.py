"""First come, first served, with prompts cut so that they never stall those that generate (Sarathi-Serve: Agrawal et
al. 2024, arXiv:2403.02310).

Every step computes a token for each request that generates, and of prompts only what leaves the step within a bound:
`max_token_ms`, or else a multiple of what a step without prompts takes when all slots generate. Both are known from the
steps that ran. Where nobody generates, nobody waits for a token, and prompts get all there is room for.

The bound must not shrink with the number of those that generate: where answers are short, one or two do at a time, and
prompts cut to five times their quick steps are computed at half the speed, so that the queue grows (a tenth less
throughput in overload on the Azure code trace, simulated).

Nobody starves: requests are let in as they came, and a step computes some of a prompt however slow it is.
"""

from ..step_plan import StepPlan
from ..waiting import Waiting

# The paper's strict bound: a token's time is at most five times that of a full step without prompts.
STALL = 5.0


class Policy(Waiting):
    """See the module."""

    def budget(self, plan: StepPlan, before: int, most: int) -> int:
        seconds = self.most_seconds
        if seconds is None and plan.decodes:
            slots = max(rows for rows, _ in self.times.sizes)
            alone = self.times.seconds((slots, 0), plan.pairs * slots / len(plan.decodes))
            seconds = None if alone is None else STALL * alone
        return most if seconds is None or not plan.decodes else self.times.most_tokens(plan, before, most, seconds)

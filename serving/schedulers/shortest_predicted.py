"""The request that will take the least work goes first, by what requests like it took (`output_lengths`).

Short ones waiting behind long ones is what makes most of the time to a first token; which are short is not known but
can be guessed (Fu et al. 2024, arXiv:2408.15792). Work is counted in tokens that the device computes: those of the
prompt, and of the output `GENERATED` for each one.

A request ages with the tokens that have been computed since it came: newcomers go before one of work w only until
`PATIENCE` * w have been. So nobody starves, and long requests are slowed down in proportion to their length.
"""

from ..output_lengths import OutputLengths
from ..step_plan import Sequence, StepPlan
from ..step_times import StepTimes
from ..waiting import Waiting

GENERATED = 4.0
PATIENCE = 512.0


class Policy(Waiting):
    """See the module."""

    def __init__(self, times: StepTimes, max_token_ms: float | None):
        super().__init__(times, max_token_ms)
        self._lengths = OutputLengths()
        self._computed = 0

    def key(self, sequence: Sequence) -> float:
        output = self._lengths.predict(sequence.request, sequence.max_output)
        return self._computed + PATIENCE * (len(sequence.prompt_ids) + GENERATED * output)

    def planned(self, plan: StepPlan) -> None:
        self._computed += plan.chunk_tokens + len(plan.decodes)

    def ended(self, sequence: Sequence, complete: bool) -> None:
        super().ended(sequence, complete)
        if complete:
            self._lengths.learn(sequence.request, len(sequence.output_ids))

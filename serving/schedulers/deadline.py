"""The request goes first that must start the soonest to be done in time (HexGen-Text2SQL: Peng et al. 2025,
arXiv:2505.05286).

A job of several requests, each made from the answers before it, has `deadline_seconds` left when one of its requests
comes, and `stages_left` to go, this one included. The request's own deadline is an equal share of the time that is
left: what one stage saves, the later ones get. Less the time that it will take, as far as that is known from those
before, it is the latest start, by which requests are ranked. One without a deadline is taken to have `PATIENCE`
seconds.

Nobody starves: a request waits only for those with an earlier latest start, and what comes after its own has a later
one.
"""

from ..output_lengths import OutputLengths
from ..step_plan import Sequence
from ..step_times import StepTimes
from ..waiting import Waiting

PATIENCE = 60.0


class Policy(Waiting):
    """See the module."""

    honours = ("deadline_seconds", "stages_left")

    def __init__(self, times: StepTimes, max_token_ms: float | None):
        super().__init__(times, max_token_ms)
        self._lengths = OutputLengths()

    def key(self, sequence: Sequence) -> float:
        request = sequence.request
        left = PATIENCE if request.deadline_seconds is None else request.deadline_seconds / request.stages_left
        return request.arrival + max(0.0, left - self._seconds(sequence))

    def ended(self, sequence: Sequence, complete: bool) -> None:
        super().ended(sequence, complete)
        if complete:
            self._lengths.learn(sequence.request, len(sequence.output_ids))

    def _seconds(self, sequence: Sequence) -> float:
        """That it will take from its start on, alone; 0 for what is not known yet."""
        prompt, output = len(sequence.prompt_ids), self._lengths.predict(sequence.request, sequence.max_output)
        rows, chunk = self.times.sizes[-1]
        reading = -(-prompt // chunk) * (self.times.seconds((rows, chunk), chunk * prompt / 2) or 0.0)
        return reading + output * (self.times.seconds(self.times.sizes[0], prompt) or 0.0)

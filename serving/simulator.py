"""The server's scheduler against a trace, without a model: what a policy would do for people, in a minute.

The scheduler is the real one; only the device is pretended. A step takes what a model of the machine says
(`step_model`, fitted to steps of a real engine: `serving/calibrate.py`), and as in the engine the next step is planned
while one runs. Times are seconds after the trace's start. No JAX.
"""

from __future__ import annotations

import dataclasses
import itertools

from .bench.traces import Trace
from .request import QueueFull, Request, SamplingParams
from .scheduler import Scheduler, SchedulerConfig
from .step_model import StepModel
from .step_plan import Sequence, StepPlan


@dataclasses.dataclass(slots=True)
class Track:
    """When the tokens of one request came. `at`: when it did itself. Nothing came of one that was refused."""

    request: Request
    at: float
    tokens: list[float] = dataclasses.field(default_factory=list)

    @property
    def to_first(self) -> float:
        return self.tokens[0] - self.at

    @property
    def gaps(self) -> list[float]:
        """Times between tokens."""
        return [after - before for before, after in zip(self.tokens, self.tokens[1:], strict=False)]

    @property
    def seconds(self) -> float:
        return self.tokens[-1] - self.at


@dataclasses.dataclass(frozen=True)
class Outcome:
    """`tracks` in the order of the requests. `seconds`: until the last step ended. `computed`: tokens, those that were
    computed again too."""

    tracks: list[Track]
    seconds: float
    steps: int
    computed: int
    preemptions: int
    refused: int


def requests_of(trace: Trace) -> list[Request]:
    """A request for each arrival, which takes all its output tokens. Prompts are the numbers of their blocks; those
    without are alike, so that nothing is kept of them in memory: serve such a trace without a prefix cache."""
    lengths: dict[int, list[int]] = {}
    found = []
    for number, one in enumerate(trace.arrivals):
        if one.blocks:
            prompt = [block for block in one.blocks for _ in range(trace.block_tokens)][: one.prompt_tokens]
        else:
            prompt = lengths.setdefault(one.prompt_tokens, [0] * one.prompt_tokens)
        params = SamplingParams(max_tokens=one.output_tokens, ignore_eos=True)
        found.append(Request(str(number), prompt, params, one.at))
    return found


def simulate(
    config: SchedulerConfig, requests: list[Request], model: StepModel, concurrency: int | None = None
) -> Outcome:
    """Serves `requests`, each from its `arrival` on, or so many at a time. Raises what the scheduler does for one that
    can never run, and ValueError for a step that the model knows nothing of."""
    scheduler = Scheduler(config)
    sizes, surprises = scheduler.times, itertools.cycle(model.surprises)
    tracks = [Track(request, request.arrival) for request in sorted(requests, key=lambda request: request.arrival)]
    track_of = {track.request.id: track for track in tracks}
    coming = iter(tracks)
    next_one = next(coming, None)
    served = 0
    now = busy_until = 0.0
    flight: tuple[StepPlan, float, float] | None = None  # with the seconds that it takes, and its end
    steps = computed = refused = 0
    while next_one is not None or flight is not None or scheduler.has_work:
        while next_one is not None and (next_one.at <= now if concurrency is None else served < concurrency):
            if concurrency is not None:
                next_one.at = now
            try:
                scheduler.add(next_one.request)
                served += 1
            except QueueFull:
                refused += 1
            next_one = next(coming, None)
        plan, before, flight = scheduler.schedule(), flight, None
        if plan is not None:
            size = sizes.size_of(plan.rows, plan.chunk_tokens)
            seconds = model.seconds(size, plan.rows, plan.pairs) * next(surprises)
            busy_until = (now + model.start if before is None else max(now, busy_until)) + seconds
            flight = plan, seconds, busy_until
            steps += 1
            computed += plan.chunk_tokens + len(plan.decodes)
        if before is not None:
            done, seconds, now = before[0], before[1], max(now, before[2])
            scheduler.observe(done, seconds)
            for sequence in _commit(scheduler, done):
                track_of[sequence.id].tokens.append(now)
                served -= sequence.finished
        elif plan is None:
            if next_one is None or concurrency is not None:
                raise RuntimeError("the scheduler has work and plans none; that is a bug")
            now = next_one.at
    return Outcome(tracks, now, steps, computed, scheduler.preemptions, refused)


def _commit(scheduler: Scheduler, plan: StepPlan) -> list[Sequence]:
    """The tokens are numbers that no other request has: only prompts are shared, as in a trace."""
    sampled = {entry.sequence.id: -1 - entry.sequence.number for entry in plan.entries if entry.is_last_chunk}
    grown = scheduler.commit(plan, sampled)
    for sequence in grown:
        if sequence.length_reached:
            scheduler.finish(sequence.id)
    return grown

"""Times the steps of a real engine on this machine, for the simulator (`step_model`).

    python -m twinax.serving.calibrate MODEL '{"max_running": 32, "chunk_tokens": 1024}'

serves random requests for half a minute, and prints a line of JSON with the model of the steps and what else a
simulation must know of the engine. A process of its own: `twinax tune serve` must not hold a model in its memory.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import statistics
import sys
import time
from typing import TYPE_CHECKING, Any

from .bench.traces import poisson
from .request import Request
from .simulator import Outcome, Track, requests_of
from .step_model import StepModel, TimedStep
from .step_plan import StepPlan

if TYPE_CHECKING:
    from .engine import Engine

ROUND_REQUESTS = 40
ROUND_SECONDS = 8.0
LOAD = 0.8  # of the rate at which the engine served the same requests when all came at once
OUTPUT_TOKENS = (8, 64)
SEED = 5


@dataclasses.dataclass(frozen=True)
class Replay:
    """What came of requests on a real engine. `starts`: seconds that each step took to start that found it idle."""

    outcome: Outcome
    steps: list[TimedStep]
    starts: list[float]


def replay(engine: Engine, requests: list[Request], seconds: float = float("inf")) -> Replay:
    """Serves them in real time, each from its `arrival` on; what is left after so many seconds is dropped."""
    scheduler: Any = engine.scheduler
    steps: list[TimedStep] = []
    starts: list[float] = []
    observe = scheduler.observe  # the only place that knows a step's time; it is listened to from here on

    def note(plan: StepPlan, took: float) -> None:
        size = scheduler.times.size_of(plan.rows, plan.chunk_tokens)
        steps.append(TimedStep(size, plan.rows, float(plan.pairs), took))
        observe(plan, took)

    scheduler.observe = note
    tracks = [Track(request, request.arrival) for request in requests]
    track_of, coming = {track.request.id: track for track in tracks}, iter(tracks)
    next_one, before, idle, start = next(coming, None), engine.stats(), True, time.perf_counter()
    try:
        while (next_one is not None or engine.has_work) and (now := time.perf_counter() - start) < seconds:
            while next_one is not None and next_one.at <= now:
                engine.add(next_one.request)
                next_one = next(coming, None)
            if engine.has_work:
                spent = engine.stats().host_seconds
                outputs = engine.step()
                if idle:  # it has sent a step and collected none
                    starts.append(engine.stats().host_seconds - spent)
                idle = not engine.has_work
                now = time.perf_counter() - start
                for output in outputs:
                    track_of[output.request_id].tokens += [now] * len(output.token_ids)
            elif next_one is not None:
                time.sleep(max(0.0, next_one.at - now))
    finally:
        scheduler.observe = observe
        for track in tracks:
            engine.cancel(track.request.id)
        while engine.has_work:
            engine.step()
    after = engine.stats()
    preemptions, count = after.preemptions - before.preemptions, after.steps - before.steps
    outcome = Outcome(tracks, time.perf_counter() - start, count, 0, preemptions, 0)
    return Replay(outcome, steps, starts)


def renamed(requests: list[Request], name: str) -> list[Request]:
    """With ids, and prompts, that no other run has."""
    found = []
    for number, one in enumerate(requests):
        prompt = [1 + (number * 7 + at) % 250 for at in range(len(one.prompt_ids))]
        found.append(Request(f"{name}-{one.id}", prompt, one.params, one.arrival))
    return found


def calibrate(engine: Engine, requests: int = ROUND_REQUESTS, name: str = "calibrate") -> Replay:
    """Random requests with short prompts, and with long ones: so many all at once, and again as they come to a busy
    server: a step of half the rows takes other than what full ones tell."""
    longest = engine.max_model_len - OUTPUT_TOKENS[1]
    found = []
    for number, most in enumerate((64, 3 * engine.config.chunk_tokens)):
        top = max(2, min(longest, most))
        trace = poisson(requests, 1000.0, (min(16, top), top), OUTPUT_TOKENS, SEED + number)
        found.append(replay(engine, renamed(requests_of(trace), f"{name}-{number}"), ROUND_SECONDS))
        served = sum(len(track.tokens) == track.request.params.max_tokens for track in found[-1].outcome.tracks)
        paced = trace.at_rate(LOAD * max(served, 1) / found[-1].outcome.seconds)
        found.append(replay(engine, renamed(requests_of(paced), f"{name}-{number}-paced"), ROUND_SECONDS))
    steps, starts = [step for one in found for step in one.steps], [start for one in found for start in one.starts]
    return Replay(found[-1].outcome, steps, starts)


def model_of(replays: list[Replay]) -> StepModel:
    """Of all their steps, in that order."""
    starts = [start for one in replays for start in one.starts]
    steps = [step for one in replays for step in one.steps]
    return StepModel.fit(steps, statistics.median(starts) if starts else 0.0)


def main(model: str, settings: dict[str, Any]) -> None:
    from ..models.cache import page_bytes
    from .engine import Engine, EngineConfig
    from .engine_sizes import cache_dtype_of
    from .fit import keeps_prefixes

    config = EngineConfig(**settings)
    engine = Engine.from_path(model, config)
    engine.warmup()
    gc.collect()
    gc.freeze()
    found = {
        "steps": model_of([calibrate(engine)]).to_json(),
        "max_model_len": engine.max_model_len,
        "token_bytes": page_bytes(engine.loaded.config, config.page_size, cache_dtype_of(config)) / config.page_size,
        "keeps_prefixes": keeps_prefixes(engine.loaded.config),
    }
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    try:
        main(sys.argv[1], json.loads(sys.argv[2]))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")

"""What a decision of the scheduler takes with 256 requests that run and 10,000 that wait, under each policy.

The median step and its commit, and the longest decision but for one in a hundred, by the time of the processor; in
every step some requests end and others are let in. With the prefix cache that servers have by default; a third of the
prompts share 128 tokens with some others.
"""

import gc
import random
import time

from twinax.serving import schedulers
from twinax.serving.engine_config import EngineConfig
from twinax.serving.request import Request, SamplingParams
from twinax.serving.scheduler import Scheduler, SchedulerConfig

from . import report
from .measures import percentile

RUNNING, WAITING, STEPS = 256, 10_000, 400


def milliseconds(policy: str, host_pages: int = 0) -> tuple[float, float, float]:
    """(deciding, 99% of it, committing): the first and the last of the median step."""
    cache = EngineConfig.prefix_cache
    pages = RUNNING * (14 if host_pages else 40)  # with those of the host, pages go there at every step
    config = SchedulerConfig(RUNNING, 16, pages, 4096, 2048, RUNNING + WAITING, cache, policy, host_pages=host_pages)
    scheduler, rng = Scheduler(config), random.Random(0)
    words = rng.choices(range(1000), k=100_000)
    fields = {name: {"priority": 2, "deadline_seconds": 9.0}[name] for name in ("priority", "deadline_seconds")}
    honoured = {name: value for name, value in fields.items() if policy in schedulers.honouring(name)}
    for number in range(RUNNING + WAITING):
        params = SamplingParams(max_tokens=100 + number % 97)
        asks = honoured if number % 3 else {}
        start = rng.randrange(len(words) - 100)
        prompt = [number % 50] * (0 if number % 3 else 128) + words[start : start + 20 + number % 90]
        scheduler.add(Request(str(number), prompt, params, number * 0.01, tenant=f"t{number % 50}", **asks))
    deciding, committing = [], []
    gc.collect()
    gc.freeze()  # as the engine does
    while len(deciding) < STEPS:
        start = time.thread_time()
        plan = scheduler.schedule()
        middle = time.thread_time()
        assert plan is not None
        sampled = {entry.sequence.id: rng.choice(words) for entry in plan.entries if entry.is_last_chunk}
        decided = time.thread_time()
        grown = scheduler.commit(plan, sampled)
        for sequence in grown:
            if sequence.length_reached:
                scheduler.finish(sequence.id)
        if len(scheduler.running) > RUNNING - 10:
            deciding.append(middle - start)
            committing.append(time.thread_time() - decided)
    return 1e3 * percentile(deciding, 50), 1e3 * percentile(deciding, 99), 1e3 * percentile(committing, 50)


def main() -> None:
    options = report.arguments(str(__doc__), peer=False).parse_args()
    rows = []
    for policy, host_pages in [*((name, 0) for name in schedulers.names()), (EngineConfig.scheduler, 26 * RUNNING)]:
        deciding, longest, committing = milliseconds(policy, host_pages)
        name = policy + ", pages in the host's memory too" * bool(host_pages)
        rows.append(report.Row("decisions", f"{name}: a decision", deciding, None, "", "ms", 1.0, False))
        rows.append(report.Row("decisions", f"{name}: a decision, 99%", longest, None, "", "ms", 1.0, False))
        rows.append(report.Row("decisions", f"{name}: a commit", committing, None, "", "ms", None, False))
    report.finish(rows, options.json)


if __name__ == "__main__":
    main()

"""What a decision of the scheduler takes with 256 requests that run and 10,000 that wait, under each policy.

The median step, with its commit; in every one of them some requests end and others are let in.
"""

import gc
import statistics
import time

from twinax.serving import schedulers
from twinax.serving.request import Request, SamplingParams
from twinax.serving.scheduler import Scheduler, SchedulerConfig

from . import report

RUNNING, WAITING, STEPS = 256, 10_000, 100


def milliseconds(policy: str) -> tuple[float, float]:
    """(deciding, committing), of the median step."""
    config = SchedulerConfig(RUNNING, 16, 256 * 40, 4096, 2048, RUNNING + WAITING, policy=policy)
    scheduler = Scheduler(config)
    fields = {name: {"priority": 2, "deadline_seconds": 9.0}[name] for name in ("priority", "deadline_seconds")}
    honoured = {name: value for name, value in fields.items() if policy in schedulers.honouring(name)}
    for number in range(RUNNING + WAITING):
        params = SamplingParams(max_tokens=100 + number % 97)
        asks = honoured if number % 3 else {}
        prompt = [1] * (20 + number % 90)
        scheduler.add(Request(str(number), prompt, params, number * 0.01, tenant=f"t{number % 50}", **asks))
    deciding, committing = [], []
    gc.collect()
    while len(deciding) < STEPS:
        start = time.perf_counter()
        plan = scheduler.schedule()
        middle = time.perf_counter()
        assert plan is not None
        grown = scheduler.commit(plan, {entry.sequence.id: 5 for entry in plan.entries if entry.is_last_chunk})
        for sequence in grown:
            if sequence.length_reached:
                scheduler.finish(sequence.id)
        if len(scheduler.running) > RUNNING - 10:
            deciding.append(middle - start)
            committing.append(time.perf_counter() - middle)
    return 1e3 * statistics.median(deciding), 1e3 * statistics.median(committing)


def main() -> None:
    options = report.arguments(str(__doc__), peer=False).parse_args()
    rows = []
    for policy in schedulers.names():
        deciding, committing = milliseconds(policy)
        rows.append(report.Row("decisions", f"{policy}: a decision", deciding, None, "", "ms", 1.0, False))
        rows.append(report.Row("decisions", f"{policy}: a commit", committing, None, "", "ms", None, False))
    report.finish(rows, options.json)


if __name__ == "__main__":
    main()

"""The scheduler's policies against each other on a trace of real traffic, simulated (`serving/simulator.py`).

    python -m benchmarks.schedulers TRACE [--requests 10000]

The device is a cost model fitted to a real engine's steps by `python -m benchmarks.step_times`, whose error against
that engine is printed too. Lengths are scaled, and requests come at `--load` times the rate that the engine could just
keep up with. A trace says nothing of who asked and how urgently, so tenants (few of them ask the most), priorities and
deadlines are drawn at random, the same for all policies.
"""

import argparse
import dataclasses
import functools
import json
import random
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from twinax.serving import schedulers
from twinax.serving.bench.traces import MOONCAKE_BLOCK, Trace, read_trace
from twinax.serving.request import Request
from twinax.serving.scheduler import SchedulerConfig
from twinax.serving.simulator import Outcome, Track, requests_of, simulate
from twinax.serving.step_model import StepModel
from twinax.serving.step_sizes import step_sizes

from . import report
from .measures import percentile

TIMES = Path(__file__).parent / "results" / "step_times.json"
TENANTS = 8
# name: (unit, whether more is better)
MEASURES = {
    "first token 50%": ("ms", False),
    "first token 99%": ("ms", False),
    "urgent's first token 99%": ("ms", False),
    "between tokens 50%": ("ms", False),
    "between tokens 99%": ("ms", False),
    "goodput": ("requests/s", True),
    "deadlines met": ("%", True),
    "light tenants' first token 99%": ("ms", False),
    "throughput": ("tokens/s", True),
    "preemptions": ("", False),
}


@dataclasses.dataclass(frozen=True)
class Wish:
    """What a request would ask, whether the policy honours it or not. Seconds after its arrival."""

    tenant: str
    priority: int
    deadline: float


def wishes(requests: list[Request], config: SchedulerConfig, model: StepModel, seed: int) -> dict[str, Wish]:
    rng = random.Random(seed)
    names = [f"tenant{number}" for number in range(TENANTS)]
    weights = [1 / (1 + number) for number in range(TENANTS)]
    found = {}
    for one in requests:
        tenant, priority = rng.choices(names, weights)[0], rng.choices((-1, 0, 1), (1, 3, 1))[0]
        found[one.id] = Wish(tenant, priority, rng.uniform(3, 60) * alone(one, config, model))
    return found


def alone(request: Request, config: SchedulerConfig, model: StepModel) -> float:
    """Seconds that it would take on an idle engine."""
    prompt, output = len(request.prompt_ids), request.params.max_tokens
    sizes = step_sizes(config.max_running, config.chunk_tokens)
    step, size = model.seconds(sizes[0], 1, prompt + output / 2), sizes[-1]
    return -(-prompt // size[1]) * model.seconds(size, 1, size[1] * prompt / 2) + output * step


def asked(request: Request, wish: Wish, policy: str) -> Request:
    """The request as that policy's server is sent it: with the fields that it honours."""
    fields: dict[str, Any] = {"tenant": wish.tenant}
    if policy in schedulers.honouring("priority"):
        fields["priority"] = wish.priority
    if policy in schedulers.honouring("deadline_seconds"):
        fields["deadline_seconds"] = wish.deadline
    return Request(request.id, request.prompt_ids, request.params, request.arrival, **fields)


def measure(outcome: Outcome, wanted: dict[str, Wish], bounds: tuple[float, float]) -> dict[str, float]:
    tracks = [track for track in outcome.tracks if track.tokens]
    wish = {track.request.id: wanted[track.request.id] for track in tracks}
    firsts = [track.to_first for track in tracks]
    gaps = [gap for track in tracks for gap in track.gaps]
    asked_for: dict[str, int] = {}
    waited: dict[str, list[float]] = {}
    for track in tracks:
        tenant, request = wish[track.request.id].tenant, track.request
        asked_for[tenant] = asked_for.get(tenant, 0) + len(request.prompt_ids) + request.params.max_tokens
        waited.setdefault(tenant, []).append(track.to_first)
    mean = sum(asked_for.values()) / len(asked_for)
    light = [first for tenant, firsts_ in waited.items() if asked_for[tenant] < mean for first in firsts_]

    def good(track: Track) -> bool:
        return track.to_first <= bounds[0] and percentile(track.gaps, 99) <= bounds[1]

    urgent = [track.to_first for track in tracks if wish[track.request.id].priority < 0]
    return {
        "first token 50%": percentile(firsts, 50) * 1e3,
        "first token 99%": percentile(firsts, 99) * 1e3,
        "urgent's first token 99%": percentile(urgent, 99) * 1e3,
        "between tokens 50%": percentile(gaps, 50) * 1e3,
        "between tokens 99%": percentile(gaps, 99) * 1e3,
        "goodput": sum(map(good, tracks)) / outcome.seconds,
        "deadlines met": 100 * sum(t.seconds <= wish[t.request.id].deadline for t in tracks) / len(outcome.tracks),
        "light tenants' first token 99%": percentile(light, 99) * 1e3,
        "throughput": sum(len(track.tokens) for track in tracks) / outcome.seconds,
        "preemptions": outcome.preemptions,
    }


def one_policy(
    policy: str,
    config: SchedulerConfig,
    requests: list[Request],
    model: StepModel,
    bounds: tuple[float, float],
    seed: int,
) -> dict[str, float]:
    wanted = wishes(requests, config, model, seed)
    asking = [asked(one, wanted[one.id], policy) for one in requests]
    return measure(simulate(dataclasses.replace(config, policy=policy), asking, model), wanted, bounds)


def repeated(trace: Trace, count: int) -> Trace:
    """The trace again and again until there are `count` requests; the next round's prompts share nothing with it."""
    arrivals, fresh = list(trace.arrivals), 1 + max((max(one.blocks, default=0) for one in trace.arrivals), default=0)
    period = trace.seconds + (1 / trace.rate if trace.seconds else 0.0)
    for number in range(len(arrivals), count):
        again, one = divmod(number, len(trace.arrivals))
        old = trace.arrivals[one]
        blocks = tuple(block + again * fresh for block in old.blocks)
        arrivals.append(dataclasses.replace(old, at=old.at + again * period, blocks=blocks))
    return dataclasses.replace(trace, arrivals=tuple(arrivals[:count]))


def main() -> None:
    parser = report.arguments(str(__doc__).splitlines()[0], peer=False)
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    parser.add_argument("trace", type=Path, help="Azure's or BurstGPT's CSV, or Mooncake's JSON lines")
    parser.add_argument("--requests", type=int, default=10000, help="the trace is repeated or cut to so many")
    parser.add_argument("--scale", type=float, default=1 / 16, help="times the trace's lengths")
    parser.add_argument("--load", type=float, default=0.9, help="times the rate that the engine can keep up with")
    parser.add_argument("--times", type=Path, default=TIMES, help="the cost model")
    parser.add_argument("--pages", type=float, default=1.0, help="pages, times those of full contexts in all slots")
    parser.add_argument("--first-token", type=float, default=1.0, help="goodput: seconds to the first token")
    parser.add_argument("--between", type=float, default=0.05, help="goodput: seconds between tokens, 99%% of them")
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument("--policies", nargs="*", default=schedulers.names())
    options = parser.parse_args()
    known = json.loads(options.times.read_text())
    model, error = StepModel.from_json(known["model"]), known["error"]
    trace = repeated(read_trace(options.trace), options.requests).lengths_times(options.scale)
    longest = max(one.prompt_tokens + one.output_tokens for one in trace.arrivals)
    blocks = any(one.blocks for one in trace.arrivals)
    page = max(1, round(MOONCAKE_BLOCK * options.scale)) if blocks else 16
    config = SchedulerConfig(
        max_running=known["slots"],
        page_size=page,
        num_pages=max(-(-longest // page), int(options.pages * known["slots"] * -(-longest // page))),
        max_model_len=longest + 1,
        chunk_tokens=known["chunk_tokens"],
        max_waiting=options.requests,
        prefix_cache="cost_aware" if blocks else None,
    )
    requests = requests_of(trace)
    flat_out = simulate(config, [Request(one.id, one.prompt_ids, one.params) for one in requests], model)
    rate = options.load * len(requests) / flat_out.seconds
    requests = requests_of(trace.at_rate(rate))
    run = functools.partial(
        one_policy, config=config, requests=requests, model=model, bounds=(options.first_token, options.between), seed=1
    )
    with ProcessPoolExecutor(options.workers) as pool:
        found = dict(zip(options.policies, pool.map(run, options.policies), strict=True))
    show(found, f"{options.trace.name}, {len(requests):,} requests, {rate:.1f} a second", error)
    if options.json:
        write(options.json, found, options.trace.name, error)


def show(found: dict[str, dict[str, float]], title: str, error: dict[str, float]) -> None:
    table = Table("policy", *(f"{name} {unit}".strip() for name, (unit, _) in MEASURES.items()), title=title)
    for policy, values in found.items():
        table.add_row(policy, *(f"{values[name]:,.{2 if values[name] < 10 else 0}f}" for name in MEASURES))
    console = Console(width=170)
    console.print(table)
    said = ", ".join(f"{name.removeprefix('simulated: ')} {value:+.0%}" for name, value in error.items())
    console.print(f"The simulator against the engine: {said}")


def write(file: Path, found: dict[str, dict[str, float]], trace: str, error: dict[str, float]) -> None:
    """Rows as other benchmarks have them; the peer is first_come."""
    rows = []
    for policy, values in found.items():
        for name, (unit, more) in MEASURES.items():
            peer = found.get("first_come", {}).get(name)
            peer = None if policy == "first_come" or not peer or not values[name] else peer
            case = f"{trace}, {policy}: {name}"
            rows.append(
                report.Row("schedulers", case, values[name], peer, "first_come" if peer else "", unit, None, more)
            )
    for name, value in error.items():
        rows.append(report.Row("schedulers", f"error, {name}", 100 * value, None, "", "%", None, False))
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row.to_json()) + "\n" for row in rows))


if __name__ == "__main__":
    main()

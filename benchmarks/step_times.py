"""How long steps of a real engine take (`serving/step_model.py`): the simulated device of `benchmarks.schedulers`.

An engine serves random requests on this machine, every step is timed, and a model is fitted to them. In between it
replays a trace in real time under several policies, and so does the simulator: the table says how far they are apart.
The first policy is replayed twice: two runs of the real engine differ, too, and no model can be nearer than that. As a
queue makes much of little, a simulation is the median of several, which meet the machine's surprises at other times.

    python -m benchmarks.step_times --out step_times.json
"""

import argparse
import dataclasses
import gc
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from twinax.serving.bench.traces import poisson, read_trace
from twinax.serving.calibrate import calibrate, model_of, renamed, replay
from twinax.serving.request import Request
from twinax.serving.scheduler import Scheduler, SchedulerConfig
from twinax.serving.simulator import Outcome, requests_of, simulate
from twinax.serving.step_model import StepModel

from . import report
from .measures import percentile

SEED = 5
LOAD = 0.8  # of what the engine can keep up with, by the model
PERCENTILES = (50, 90, 99)
SIMULATIONS = 9
BETWEEN = 20  # requests of each kind between two replays, to fit the model to


def engine_of(folder: Path, slots: int, chunk_tokens: int, longest: int) -> Any:
    from twinax.serving.engine import Engine, EngineConfig

    config = EngineConfig(
        max_running=slots, chunk_tokens=chunk_tokens, max_model_len=longest + 1, max_waiting=10**6, prefix_cache=""
    )
    engine = Engine.from_path(folder, config)
    engine.warmup()
    return engine


def summary(outcome: Outcome) -> dict[str, float]:
    """In milliseconds."""
    firsts = [track.to_first for track in outcome.tracks]
    gaps = [gap for track in outcome.tracks for gap in track.gaps]
    found = {f"first token, {percent}%": percentile(firsts, percent) for percent in PERCENTILES}
    found |= {f"between tokens, {percent}%": percentile(gaps, percent) for percent in PERCENTILES}
    return {name: 1e3 * seconds for name, seconds in found.items()}


def simulated(config: SchedulerConfig, requests: list[Request], model: StepModel) -> list[dict[str, float]]:
    found = []
    for number in range(SIMULATIONS):
        first = number * len(model.surprises) // SIMULATIONS
        turned = model.surprises[first:] + model.surprises[:first]
        found.append(summary(simulate(config, requests, dataclasses.replace(model, surprises=turned))))
    return found


def main() -> None:
    from . import model

    parser = report.arguments(str(__doc__).splitlines()[0], peer=False)
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/step_times.json"), help="the cost model")
    parser.add_argument("--model", type=Path, help="a model's folder; default: random weights of the demo's shape")
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--chunk-tokens", type=int, default=256)
    parser.add_argument("--trace", type=Path, help="to replay; default: random requests")
    parser.add_argument("--scale", type=float, default=1 / 16, help="times the trace's lengths")
    parser.add_argument("--replay", type=int, default=300, help="requests of the trace")
    parser.add_argument("--policies", nargs="+", default=["first_come", "sarathi", "shortest_predicted"])
    options = parser.parse_args()
    shape = dataclasses.replace(
        model.CONFIG, vocab_size=512, hidden_size=192, intermediate_size=512, num_layers=4, num_heads=6, num_kv_heads=3,
        head_dim=32,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as made:
        folder = options.model or model.write(Path(made), shape)
        engine = engine_of(folder, options.slots, options.chunk_tokens, 1000)
        gc.collect()
        gc.freeze()  # as the server does
        rows, found = compare(engine, options)
    error = {row.case.removeprefix("simulated: "): row.ours / row.peer - 1 for row in rows if row.peer}
    about = {"shape": str(options.model or "the demo's"), "slots": options.slots, "chunk_tokens": options.chunk_tokens}
    options.out.write_text(json.dumps({**about, "model": found.to_json(), "error": error}) + "\n")
    report.finish(rows, options.json)


def compare(engine: Any, options: argparse.Namespace) -> tuple[list[report.Row], StepModel]:
    known = engine.scheduler.config
    config = SchedulerConfig(**{name: getattr(known, name) for name in known.__dataclass_fields__})
    calibrated = [calibrate(engine)]
    trace = poisson(options.replay, 50.0, (16, 300), (8, 64), SEED + 1)
    if options.trace:
        trace = read_trace(options.trace, options.replay).lengths_times(options.scale)
    flat_out = simulate(config, requests_of(trace.faster(1e9)), model_of(calibrated))
    trace = trace.at_rate(LOAD * len(trace.arrivals) / flat_out.seconds)
    real: list[tuple[str, dict[str, float]]] = []
    for policy in (options.policies[0], *options.policies):
        engine.scheduler = Scheduler(dataclasses.replace(config, policy=policy))
        name = f"{policy}{len(real)}"
        real.append((policy, summary(replay(engine, renamed(requests_of(trace), name)).outcome)))
        # The machine's speed drifts: what the model is fitted to is spread over the time of the replays.
        calibrated.append(calibrate(engine, BETWEEN, name))
    fitted, rows = model_of(calibrated), []
    again, first = real[0][1], real[1][1]
    for name in first:
        case = f"the engine again: {options.policies[0]}: {name}"
        rows.append(report.Row("step_times", case, again[name], first[name], "the engine", "ms", None, False))
    for policy, measured in real[1:]:
        pretended = simulated(dataclasses.replace(config, policy=policy), requests_of(trace), fitted)
        for name in measured:
            case, ours = f"simulated: {policy}: {name}", statistics.median(one[name] for one in pretended)
            rows.append(report.Row("step_times", case, ours, measured[name], "the engine", "ms", None, False))
    return rows, fitted


if __name__ == "__main__":
    main()

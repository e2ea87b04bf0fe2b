"""Engine settings for a machine and a workload: `twinax tune serve`.

First by the simulator (`foresee`), which takes a second where a server takes half a minute: it goes through many
settings, after the steps of an engine were timed on this machine. Then the best few of those are measured on the real
server, by successive halving (Jamieson and Talwalkar 2016, arXiv:1502.07943): all see a few requests, the best third of
them three times as many, and so on, so that most of the time goes to settings that may win. The server's own defaults
are among them and stay to the end, to say what was gained.
"""

import dataclasses
import itertools
import json
import math
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .. import schedulers
from ..engine_config import EngineConfig
from ..step_times import StepTimes
from .config import BenchConfig
from .foresee import KNOWN, foresee, timed
from .local import ServerFailed, local_server
from .main import load_of, measure
from .summary import Summary
from .traces import Trace

Settings = dict[str, Any]
Score = tuple[float, ...]

GOALS = ("goodput", "throughput")
KEPT = 3  # one of so many goes on
FEWEST_REQUESTS = 8
MAX_REQUESTS = 200  # of the last round, by default


@dataclasses.dataclass(frozen=True, kw_only=True)
class TuneConfig:
    """How settings are looked for.

    Attributes:
        goal: "goodput" (most requests within the latency bounds, then the lowest latencies) or "throughput" (most
            tokens a second).
        candidates: settings to measure on the real server.
        simulated: settings to simulate first, the best of which are the candidates; 0: candidates are drawn at random.
        space: JSON object with lists of values to try, by setting; in place of the built-in lists of these settings.
        fixed: JSON object of settings that every candidate has.
        out: the file to write, for `twinax serve --config`.
    """

    goal: str = "goodput"
    candidates: int = 4
    simulated: int = 200
    space: str = "{}"
    fixed: str = "{}"
    out: str = "serve.json"

    def __post_init__(self) -> None:
        if self.goal not in GOALS:
            raise ValueError(f"goal is one of {', '.join(GOALS)}; got {self.goal!r}")
        if self.candidates < 2:
            raise ValueError(f"candidates is a number from 2 up, got {self.candidates}")
        if self.simulated and self.simulated < self.candidates:
            raise ValueError(
                f"simulated is 0, or at least the number of candidates, {self.candidates}; got {self.simulated}"
            )
        for name, values in self.lists.items():
            if not (isinstance(values, list) and values):
                raise ValueError(f"space has a list of values for each setting; got {values!r} for {name}")
        _object("fixed", self.fixed)

    @property
    def lists(self) -> dict[str, list[Any]]:
        return _object("space", self.space)

    @property
    def fixed_settings(self) -> Settings:
        return _object("fixed", self.fixed)


@dataclasses.dataclass(frozen=True)
class Trial:
    """One measurement, or simulation, of one candidate. `failure`: why there is no summary."""

    settings: Settings
    requests: int
    summary: Summary | None
    failure: str = ""


def space_of(config: TuneConfig, shares_prefixes: bool) -> dict[str, list[Any]]:
    """The values to try of each setting."""
    # Policies that go by fields of requests have nothing to go by here.
    policies = [name for name in schedulers.names() if not schedulers.load(name, StepTimes([])).honours]
    space: dict[str, list[Any]] = {
        "max_running": [4, 8, 16, 32],
        "chunk_tokens": [64, 128, 256, 512, 1024],
        "page_size": [16, 32, 64, 128],
        "scheduler": policies,
    }
    if shares_prefixes:
        space["prefix_cache"] = ["lru", "cost_aware"]
    return space | config.lists


def candidates(space: Mapping[str, Sequence[Any]], count: int, seed: int) -> list[Settings]:
    """The server's defaults (no setting at all), and `count - 1` others, drawn without repetition."""
    size = math.prod(map(len, space.values()))
    drawn = random.Random(seed).sample(range(size), min(count - 1, size))
    grid = [list(values) for values in space.values()]
    found: list[Settings] = [{}]
    for number in drawn:
        values = []
        for each in reversed(grid):
            number, at = divmod(number, len(each))
            values.append(each[at])
        found.append(dict(zip(space, reversed(values), strict=True)))
    return found


def best_of(foreseen: Sequence[Trial], count: int, key: Callable[[Trial], Score]) -> list[Trial]:
    """The first, which is of the defaults, and the best others. Of those that the simulator can't tell apart one."""
    found: dict[Score, Trial] = {}
    for trial in foreseen[1:]:
        if trial.summary is not None:
            found.setdefault(key(trial), trial)
    return [foreseen[0], *(found[one] for one in sorted(found, reverse=True)[: count - 1])]


def rounds(count: int, requests: int) -> list[tuple[int, int]]:
    """(candidates, requests) of each round: a third of the former and three times the latter, down to two."""
    counts = [count]
    while counts[-1] > 2:
        counts.append(max(counts[-1] // KEPT, 2))
    last = len(counts) - 1
    return [(n, max(min(FEWEST_REQUESTS, requests), requests // KEPT ** (last - i))) for i, n in enumerate(counts)]


def score(trial: Trial, load: BenchConfig, goal: str) -> Score:
    """Greater is better."""
    summary = trial.summary
    if summary is None or not summary.sent:
        return (-1.0,)
    if goal == "throughput":
        return (summary.output_rate,)
    # Of settings that keep the bounds equally often, the one that is farther from them.
    near = summary.ttft.p50 * 1e3 / load.max_ttft_ms + summary.per_token.p50 * 1e3 / load.max_itl_ms
    return (round(summary.good / summary.sent, 3), -near)


def halve(
    settings: Sequence[Settings],
    requests: int,
    try_out: Callable[[Settings, int], Trial],
    key: Callable[[Trial], Score],
) -> list[list[Trial]]:
    """Successive halving. Returns the trials of each round, best first; the first of `settings` is in every round."""
    alive, found = list(settings), []
    for (_, each), following in itertools.zip_longest(plan := rounds(len(alive), requests), plan[1:]):
        trials = sorted((try_out(one, each) for one in alive), key=key, reverse=True)
        found.append(trials)
        if following is None:
            break
        alive = [trial.settings for trial in trials][: following[0]]
        if settings[0] not in alive:
            alive[-1] = settings[0]
    return found


def tune(model: str, load: BenchConfig, config: TuneConfig) -> int:
    """Tries, prints, writes; returns the exit status: 1 when no setting worked. Raises TraceError, OSError."""
    out = Path(config.out)
    if not out.absolute().parent.is_dir():
        raise FileNotFoundError(f"there is no folder {out.absolute().parent} to write {out} to")
    trace = load_of(load)
    most = len(trace.arrivals) if load.requests else min(len(trace.arrivals), MAX_REQUESTS)
    space = space_of(config, any(one.blocks for one in trace.arrivals))
    console, whole = Console(width=None if sys.stdout.isatty() else 120), math.prod(map(len, space.values()))
    blind = sorted(set(space) - KNOWN)
    foreseen: list[Trial] = []
    if config.simulated and not blind:
        drawn = candidates(space, config.simulated, load.seed_used)
        trials = _simulate(model, trace.first(most), load, config, drawn, space, console)
        foreseen = best_of(trials, config.candidates, lambda trial: score(trial, load, config.goal))
        settings = [trial.settings for trial in foreseen]
        for trial in foreseen:
            console.print(f"simulated: {_said(trial)}", highlight=False, soft_wrap=True)
    else:
        if config.simulated:
            console.print(f"the simulator knows nothing of {', '.join(blind)}: settings are drawn at random")
        settings = candidates(space, config.candidates, load.seed_used)
    console.print(
        f"to measure: the defaults and {len(settings) - 1} of {whole:,} settings, in rounds of "
        + ", ".join(f"{count} x {requests} requests" for count, requests in rounds(len(settings), most)),
        highlight=False,
        soft_wrap=True,
    )

    def try_out(one: Settings, requests: int) -> Trial:
        # What waits is not refused: how long it takes to be served is the question.
        served = {"max_waiting": max(256, requests)} | config.fixed_settings | one
        try:
            with local_server(model, served) as url:
                trial = Trial(one, requests, measure(dataclasses.replace(load, url=url, requests=requests)).summary)
        except ServerFailed as error:
            trial = Trial(one, requests, None, str(error))
        console.print(f"measured: {_said(trial)}", highlight=False, soft_wrap=True)
        return trial

    found = halve(settings, most, try_out, lambda trial: score(trial, load, config.goal))
    console.print(_table(found[-1], foreseen))
    best, default = found[-1][0], next(trial for trial in found[-1] if not trial.settings)
    if best.summary is None:
        console.print("No setting worked.", style="bold red")
        return 1
    out.write_text(json.dumps(config.fixed_settings | best.settings, indent=1) + "\n")
    if best is default:
        console.print("The server's own defaults were best.")
    console.print(f"wrote {out}: twinax serve {model} --config {out}", highlight=False, soft_wrap=True)
    return 0


def _simulate(
    model: str,
    trace: Trace,
    load: BenchConfig,
    config: TuneConfig,
    settings: Sequence[Settings],
    space: Mapping[str, Sequence[Any]],
    console: Console,
) -> list[Trial]:
    """Times the steps of an engine that has all sizes of steps, and simulates each of `settings`."""
    begin = time.perf_counter()
    names = ("max_running", "chunk_tokens")
    largest = {name: max(getattr(EngineConfig(), name), *space.get(name, ())) for name in names}
    machine = timed(model, largest | config.fixed_settings)
    middle = time.perf_counter()
    trials = []
    for one in settings:
        try:
            summary, failure = foresee(machine, trace, load, config.fixed_settings | one), ""
        except ValueError as error:
            summary, failure = None, str(error)
        trials.append(Trial(one, len(trace.arrivals), summary, failure))
    console.print(
        f"simulated: {len(settings)} settings with {len(trace.arrivals)} requests each, in "
        f"{time.perf_counter() - middle:.0f} s, after {middle - begin:.0f} s in which the engine's steps were timed",
        highlight=False,
        soft_wrap=True,
    )
    return trials


def _said(trial: Trial) -> str:
    name = ", ".join(f"{key} {value}" for key, value in trial.settings.items()) or "defaults"
    if trial.summary is None:
        return f"{name}: {trial.failure}"
    summary = trial.summary
    good = summary.good / max(summary.sent, 1)
    return f"{name}: {trial.requests} requests, {good:.0%} within the bounds, {summary.output_rate:,.1f} tokens/s"


def _table(trials: Sequence[Trial], foreseen: Sequence[Trial] = ()) -> Table:
    """Each with what the simulator said of it before, where it did."""
    table = Table(title=f"the last round, {trials[0].requests} requests each; best first")
    for name in ("settings", "", "within bounds", "tokens/s", "first token p50, p99", "a token p50, p99"):
        table.add_column(name, justify="left" if name in ("settings", "") else "right", overflow="fold")
    for trial in trials:
        name = "\n".join(f"{key} {value}" for key, value in trial.settings.items()) or "defaults"
        table.add_row(name, *_cells("measured", trial))
        for before in foreseen:
            if before.settings == trial.settings:
                table.add_row("", *_cells("simulated", before))
    return table


def _cells(how: str, trial: Trial) -> list[str]:
    summary = trial.summary
    if summary is None:
        return [how, trial.failure]
    times = [f"{one.p50 * 1e3:,.0f}, {one.p99 * 1e3:,.0f} ms" for one in (summary.ttft, summary.per_token)]
    return [how, f"{summary.good / summary.sent:.1%}", f"{summary.output_rate:,.1f}", *times]


def _object(name: str, text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ValueError(f'{name} is a JSON object such as {{"max_running": 8}}; got {text!r}')
    return found

"""Runs a measurement from beginning to end: `twinax bench serve`."""

import asyncio
import contextlib
import dataclasses
import json
import math
import signal
import sys
from pathlib import Path
from typing import Any

import uvloop
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .config import BenchConfig
from .load import ClientHealth, run_load
from .plot import write_plot
from .prompts import source_text
from .summary import Summary, show, summarize, to_json
from .target import Record, Target
from .traces import Trace, poisson, read_trace


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run gave. `notes`: what it was, in words."""

    summary: Summary
    health: ClientHealth
    records: list[Record]
    notes: list[str]
    facts: dict[str, Any]


def bench(config: BenchConfig) -> int:
    """Measures, prints, writes; returns the exit status: 1 when no request was answered.

    Raises TraceError, TargetError, OSError.
    """
    for path in (config.json, config.plot):
        if path is not None and not Path(path).absolute().parent.is_dir():
            raise FileNotFoundError(f"there is no folder {Path(path).absolute().parent} to write {path} to")
    console = Console(width=None if sys.stdout.isatty() else 120)
    result = measure(config, Console(stderr=True))
    for note in result.notes:
        console.print(note, highlight=False)
    show(result.summary, result.health, config, console)
    if config.json is not None:
        everything = to_json(result.summary, result.health, result.records, result.facts)
        Path(config.json).write_text(json.dumps(everything, indent=1) + "\n")
    if config.plot is not None:
        write_plot(Path(config.plot), result.records, config, title=result.notes[0])
    return 0 if result.summary.completed else 1


def measure(config: BenchConfig, console: Console | None = None) -> Result:
    """One run; its progress goes to `console` when that is a terminal."""
    return uvloop.run(_measure(config, console or Console(quiet=True)))


def load_of(config: BenchConfig) -> Trace:
    """The requests that the settings ask for. Raises TraceError, OSError."""
    rate = config.mean_rate
    if config.trace is None:
        count = config.requests
        if count is None and rate and config.duration and not math.isinf(rate):
            count = math.ceil(rate * config.duration)
        ranges = config.prompt_range, config.output_range
        trace = poisson(count or 200, rate or math.inf, *ranges, config.seed_used, config.shared_prefix)
        return trace.lengths_times(config.length_factor)
    trace = read_trace(config.trace, config.requests).lengths_times(config.length_factor)
    if rate is not None:
        return trace.at_rate(rate)
    return trace.faster(config.speed or 1.0)


async def _measure(config: BenchConfig, console: Console) -> Result:
    trace = load_of(config)
    target = Target(config)
    try:
        prompts = await target.prepare(source_text(config.text), trace.block_tokens)
        trace, cut = fitted(trace, target.max_tokens)
        requests = [
            target.encode(prompts.make(number, one), one.output_tokens) for number, one in enumerate(trace.arrivals)
        ]
        stop = asyncio.Event()
        with _display(console, len(requests)) as on_done, _stopped_by_signal(stop):
            records, health = await run_load(
                target,
                trace.arrivals,
                requests,
                concurrency=config.concurrency,
                duration=config.duration,
                on_done=on_done,
                stop=stop,
            )
    finally:
        target.client.close()
    how = "all at once" if math.isinf(trace.rate) else f"{trace.rate:,.4g} requests a second"
    how = f"{config.concurrency} clients in turn" if config.concurrency else how
    notes = [f"{target.model} at {config.url}: {trace.source}, {len(requests):,} requests, {how}, seed {config.seed}"]
    if cut:
        notes.append(f"{cut:,} requests were shortened to the model's context of {target.max_tokens:,} tokens")
    if trace.skipped:
        notes.append(f"{trace.skipped:,} requests of the trace had failed where it was recorded; they are left out")
    shown = {field.name: getattr(config, field.name) for field in dataclasses.fields(config) if field.repr}
    facts = {"model": target.model, "config": shown, "notes": notes + target.notes}
    return Result(summarize(records, config), health, records, notes + target.notes, facts)


def fitted(trace: Trace, most: int | None) -> tuple[Trace, int]:
    """Requests that are too long for the model, cut: the output first to half of the room, then the prompt."""
    if most is None:
        return trace, 0
    fitted = []
    for one in trace.arrivals:
        if one.prompt_tokens + one.output_tokens >= most:
            output = min(one.output_tokens, max(most // 2, 1))
            prompt = max(min(one.prompt_tokens, most - 1 - output), 1)
            one = dataclasses.replace(one, prompt_tokens=prompt, output_tokens=output)
        fitted.append(one)
    cut = sum(a is not b for a, b in zip(fitted, trace.arrivals, strict=True))
    return dataclasses.replace(trace, arrivals=tuple(fitted)), cut


@contextlib.contextmanager
def _stopped_by_signal(stop: asyncio.Event):
    """Ctrl-C ends the run; what was measured until then is reported."""
    loop = asyncio.get_running_loop()
    try:
        loop.add_signal_handler(signal.SIGINT, stop.set)
    except (ValueError, RuntimeError):  # not the main thread: nobody sends us signals
        yield
        return
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGINT)


@contextlib.contextmanager
def _display(console: Console, total: int):
    """A bar with what is done, failed and on its way; none where nobody looks."""
    if not console.is_terminal:
        yield lambda record: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, refresh_per_second=4) as progress:
        task, tokens, failed = progress.add_task("sending", total=total), 0, 0

        def done(record: Record) -> None:
            nonlocal tokens, failed
            tokens += record.output_tokens
            failed += record.error is not None
            progress.update(task, advance=1, description=f"{tokens:,} tokens, {failed:,} failed")

        yield done

"""What a server would do with settings that it was not started with: the simulator, with steps timed on this machine.

The simulator knows the scheduler, and how long steps take; it knows nothing of HTTP and tokenising, and not that other
page sizes make attention quicker or slower. So it says which settings are worth measuring, not how good they are.
"""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from ..engine_config import EngineConfig
from ..scheduler_config import SchedulerConfig
from ..simulator import Outcome, requests_of, simulate
from ..step_model import StepModel
from .config import BenchConfig
from .local import ServerFailed
from .main import fitted
from .summary import Summary, summarize
from .target import Record
from .traces import Trace

# Settings whose effect the simulator sees.
KNOWN = frozenset(
    ("max_running", "page_size", "num_pages", "cache_bytes", "chunk_tokens", "max_waiting", "prefix_cache", "scheduler")
) | {"max_token_ms"}


@dataclasses.dataclass(frozen=True)
class Machine:
    """An engine on this machine. `token_bytes`: of its cache. `keeps_prefixes`: whether it can share them."""

    steps: StepModel
    max_model_len: int
    token_bytes: float
    keeps_prefixes: bool


def timed(model: str, settings: Mapping[str, Any]) -> Machine:
    """Times steps of an engine with these settings, in a process of its own. Raises ServerFailed with what it said."""
    names = {field.name for field in dataclasses.fields(EngineConfig)}
    own = {name: value for name, value in settings.items() if name in names}
    own |= {"prefix_cache": "", "max_waiting": 256}  # nothing is refused, and every prompt computed
    command = [sys.executable, "-P", "-m", "twinax.serving.calibrate", model, json.dumps(own)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        said = [line for line in lines if "rror" in line] or lines
        raise ServerFailed(said[-1] if said else f"timing the engine's steps ended with status {done.returncode}")
    found = json.loads(done.stdout.strip().splitlines()[-1])
    return Machine(**{**found, "steps": StepModel.from_json(found["steps"])})


def foresee(machine: Machine, trace: Trace, load: BenchConfig, settings: Mapping[str, Any]) -> Summary:
    """Of a run of that load. Raises ValueError for settings that can't serve it."""
    trace, _ = fitted(trace, machine.max_model_len)
    if load.duration is not None and load.concurrency is None:
        trace = dataclasses.replace(trace, arrivals=tuple(one for one in trace.arrivals if one.at <= load.duration))
    known = {name: value for name, value in settings.items() if name in KNOWN}
    config = EngineConfig(**{"max_waiting": max(256, len(trace.arrivals)), **known})
    # Without blocks all prompts of a length are alike to the simulator.
    shares = machine.keeps_prefixes and any(one.blocks for one in trace.arrivals)
    each = -(-machine.max_model_len // config.page_size)
    within = int(config.cache_bytes // max(machine.token_bytes * config.page_size, 1))
    outcome = simulate(
        SchedulerConfig(
            max_running=config.max_running,
            page_size=config.page_size,
            num_pages=config.num_pages or min(config.max_running * each, within),
            max_model_len=machine.max_model_len,
            chunk_tokens=config.chunk_tokens,
            max_waiting=config.max_waiting,
            prefix_cache=config.prefix_cache or None if shares else None,
            policy=config.scheduler,
            max_token_ms=config.max_token_ms,
        ),
        requests_of(trace),
        machine.steps,
        load.concurrency,
    )
    return summarize(_records(outcome), load)


def _records(outcome: Outcome) -> list[Record]:
    """As a client would have seen it."""
    found = []
    for number, track in enumerate(outcome.tracks):
        prompt, output = len(track.request.prompt_ids), track.request.params.max_tokens
        record = Record(number, track.at, prompt, output, sent=track.at, done=track.at)
        if track.tokens:
            record.first, record.last, record.done = track.tokens[0], track.tokens[-1], track.tokens[-1]
            record.gaps = track.gaps
            record.prompt_tokens, record.output_tokens = prompt, len(track.tokens)
        else:
            record.error = "status 429"
        found.append(record)
    return found

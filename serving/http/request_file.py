"""Answers a file of requests with an engine of its own, and no server: what `twinax generate --input` does.

The lines, the order in which they run and the answers are those of `/v1/batches`. An answer is written as soon as it is
there, so that the same command, run again after anything has stopped it, goes on with the lines that have none.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .batch_lines import LineError, NotAnAnswer, Place, answer_line, read_lines, written_answers
from .batch_work import ENDPOINTS, run_lines
from .config import ServeConfig
from .engine_client import EngineClient, describe
from .launch import LaunchedEngine
from .metrics import Metrics
from .running import engine_settings
from .service import Service

Done = Callable[[int, dict[str, Any]], None]
Say = Callable[[str], None]


class BadFile(ValueError):
    """The input can't be used; the message says which lines are wrong, and nothing was run."""

    def __init__(self, path: Path, errors: list[LineError]) -> None:
        where = [f"line {error.line}: {error.message}" if error.line else error.message for error in errors[:10]]
        more = [f"... and {len(errors) - 10} more"] if len(errors) > 10 else []
        super().__init__("\n".join([f"{path} can't be used; nothing was run.", *where, *more]))


@dataclass(frozen=True)
class Work:
    """What a file asks for: the `places` of all its lines, and of those that have no answer yet (`left`). `failed`
    answers of the others are errors. `model`: what its first line calls the model."""

    endpoint: str
    model: str | None
    places: list[Place]
    left: list[Place]
    failed: int


def plan_file(source: Path, answers: Path, most_line_bytes: int) -> Work:
    """Reads a file of requests, and the answers that an earlier run has written. Raises BadFile, OSError."""
    endpoint, model = _first_line(source, most_line_bytes)
    places, errors = read_lines(source, endpoint, most_line_bytes)
    if errors:
        raise BadFile(source, errors)
    try:
        done = {answer.custom_id: answer.is_error for answer in written_answers(answers)}
    except NotAnAnswer as error:
        message = "It is no answer to a request, and nothing here is written over; choose another --output."
        raise BadFile(answers, [LineError("other_file", message, error.line)]) from None
    if strangers := done.keys() - {place.custom_id for place in places}:
        message = f"It answers {min(strangers)!r}, which {source} does not ask for; choose another --output."
        raise BadFile(answers, [LineError("other_file", message)])
    left = [place for place in places if place.custom_id not in done]
    return Work(endpoint, model, places, left, sum(done.values()))


def _first_line(source: Path, most_line_bytes: int) -> tuple[str, str | None]:
    """Its endpoint, which all others must have too, as `read_lines` sees to, and its model."""
    with source.open("rb") as file:
        first = next((line for line in iter(lambda: file.readline(most_line_bytes), b"") if line.strip()), b"")
    try:
        line = json.loads(first)
        url, model = line["url"], line["body"].get("model")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return ENDPOINTS[0], None  # `read_lines` says what is wrong
    return url if url in ENDPOINTS else ENDPOINTS[0], model if isinstance(model, str) and model else None


def run_file(config: ServeConfig, work: Work, source: Path, answers: Path, done: Done, say: Say) -> None:
    """Answers what is left of `work`, a line for each to the end of `answers`; calls `done(status, body)` after each.

    Raises EngineError when the engine does not start or died too often; what was answered until then is kept.
    """
    with LaunchedEngine() as launched, answers.open("ab") as file:

        def write(custom_id: str, status: int, body: dict[str, Any]) -> None:
            file.write(answer_line(custom_id, status, body))
            file.flush()
            done(status, body)

        asyncio.run(_run(config, launched, work, source, write, say))


async def _run(
    config: ServeConfig,
    launched: LaunchedEngine,
    work: Work,
    source: Path,
    write: Callable[[str, int, dict[str, Any]], None],
    say: Say,
) -> None:
    metrics = Metrics()
    engine = EngineClient(
        launched,
        engine_settings(config),
        metrics,
        max_restarts=config.max_restarts,
        hang_seconds=config.hang_seconds,
        say=say,
        on_progress=lambda progress: say(describe(progress)),
        on_log=say,
    )
    service = Service(engine, metrics, config.model_id, config.max_body_bytes)

    async def answer() -> None:
        await engine.started.wait()
        await run_lines(service, work.endpoint, source, work.left, "", write)

    supervision, answering = asyncio.create_task(engine.run()), asyncio.create_task(answer())
    try:
        await asyncio.wait([supervision, answering], return_when=asyncio.FIRST_COMPLETED)
        if supervision.done():
            supervision.result()
        await answering
    finally:
        await engine.stop()
        for task in (supervision, answering):
            task.cancel()
        await asyncio.gather(supervision, answering, return_exceptions=True)

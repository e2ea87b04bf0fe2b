"""A job: one HTTP request that generates, as a group of engine requests, and the shape of its answer."""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, Protocol

from ..request import Output, Request
from .errors import ApiError, bad
from .service import Caller, Service


class Job(Protocol):
    """`feed` each output and take the `body`; or, when `stream`, send the `events` of each, and the `last_events`.

    `named_events`: the stream names each event by its type, and needs no mark at its end.
    """

    id: str
    named_events: bool = False
    stream: bool
    requests: list[Request]

    def first_events(self) -> Iterator[dict[str, Any]]:
        """Sent as soon as the job is admitted."""
        return iter(())

    def events(self, output: Output) -> Iterator[dict[str, Any]]: ...

    def last_events(self) -> Iterator[dict[str, Any]]: ...

    def failed(self, error: ApiError) -> Iterator[dict[str, Any]]:
        """Sent in place of what is left when it is too late for a status."""
        yield error.body()

    def feed(self, output: Output) -> None: ...

    def body(self) -> dict[str, Any]: ...


JobMaker = Callable[[Service, dict[str, Any], float], Awaitable[Job]]


async def run_job(service: Service, job: Job, caller: Caller) -> dict[str, Any]:
    """The whole answer of a job that is not streamed."""
    async with service.generate(job.requests, caller) as outputs:
        async for output in outputs:
            job.feed(output)
    return job.body()


def new_id(prefix: str) -> str:
    return f"{prefix}-{secrets.token_hex(16)}"


def check_count(service: Service, count: int, param: str) -> None:
    """Refuse for good what could never be admitted, instead of answering "queue full" for ever."""
    most = service.engine.info.max_waiting
    if count > most:
        raise bad(
            param, f"'{param}' asks for {count} completions in all; the server's queue holds {most}. Ask for fewer."
        )

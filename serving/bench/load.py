"""When requests go out: by the clock, whatever the server does (open loop), or one after another (closed loop).

An open loop measures from when a request was due and not from when it left, so that a client that is late does not
flatter the server (the "coordinated omission" of closed loops). How late it was, and how long the event loop kept
things waiting, is measured beside, so that a client that was too slow is seen and not blamed on the server.
"""

import asyncio
import dataclasses
import itertools
import resource
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from .target import Record, Target
from .traces import Arrival

clock = time.perf_counter

_TICK = 0.02  # seconds between looks at the event loop
_SOCKETS = 1 << 16


@dataclasses.dataclass(frozen=True)
class ClientHealth:
    """What the client did to the measurement.

    Attributes:
        busy: its share of one core.
        sent_late_p99, loop_late_p99: seconds by which requests left, and by which the event loop woke, too late.
        connections: opened.
    """

    busy: float
    sent_late_p99: float
    loop_late_p99: float
    connections: int


async def run_load(
    target: Target,
    arrivals: Sequence[Arrival],
    requests: Sequence[bytes],
    *,
    concurrency: int | None = None,
    duration: float | None = None,
    on_done: Callable[[Record], None] = lambda record: None,
    stop: asyncio.Event | None = None,
) -> tuple[list[Record], ClientHealth]:
    """Sends `requests[i]` at `arrivals[i].at` seconds, or by `concurrency` clients in turn; waits for all answers.

    Args:
        duration: seconds after which nothing more is sent.
        on_done: called with each record when its request is over.
        stop: when set, nothing more is sent and what is under way is given up.

    Returns the records of what was sent, in order.
    """
    _raise_file_limit()
    stop = stop or asyncio.Event()
    records: list[Record] = []
    lateness: list[float] = []
    before = target.client.connections
    watch = asyncio.create_task(_watch(lateness))
    cpu, start = time.process_time(), clock()
    open_loop = concurrency is None

    async def one(number: int) -> None:
        arrival = arrivals[number]
        due = arrival.at if open_loop else clock() - start
        record = Record(number, due, arrival.prompt_tokens, arrival.output_tokens)
        records.append(record)
        try:
            await target.run(record, requests[number], start)
        finally:
            on_done(record)

    sending = (
        _by_the_clock(one, arrivals, start, duration)
        if concurrency is None
        else _in_turn(one, len(arrivals), concurrency, start, duration)
    )
    job, stopped = asyncio.create_task(sending), asyncio.create_task(stop.wait())
    try:
        await asyncio.wait([job, stopped], return_when=asyncio.FIRST_COMPLETED)
        if not job.done():
            job.cancel()
        await asyncio.gather(job, return_exceptions=stop.is_set())
    finally:
        for task in (job, watch, stopped):
            task.cancel()
    seconds = max(clock() - start, 1e-9)
    sent_late = [record.sent - record.due for record in records]
    health = ClientHealth(
        busy=(time.process_time() - cpu) / seconds,
        sent_late_p99=float(np.percentile(sent_late, 99)) if sent_late else 0.0,
        loop_late_p99=float(np.percentile(lateness, 99)) if lateness else 0.0,
        connections=target.client.connections - before,
    )
    return sorted(records, key=lambda record: record.number), health


async def _by_the_clock(one: Callable, arrivals: Sequence[Arrival], start: float, duration: float | None) -> None:
    async with asyncio.TaskGroup() as group:
        for number, arrival in enumerate(arrivals):
            if duration is not None and arrival.at > duration:
                break
            wait = start + arrival.at - clock()
            # Requests that are due together go out together, yet each is begun before the next is.
            await asyncio.sleep(max(wait, 0))
            group.create_task(one(number))


async def _in_turn(one: Callable, count: int, concurrency: int, start: float, duration: float | None) -> None:
    numbers = itertools.count()

    def mine() -> Iterator[int]:
        while (number := next(numbers)) < count and (duration is None or clock() - start < duration):
            yield number

    async def client() -> None:
        for number in mine():
            await one(number)

    async with asyncio.TaskGroup() as group:
        for _ in range(min(concurrency, count)):
            group.create_task(client())


async def _watch(lateness: list[float]) -> None:
    """Sleeps for a tick again and again, and notes how much longer it was."""
    while True:
        before = clock()
        await asyncio.sleep(_TICK)
        lateness.append(max(clock() - before - _TICK, 0.0))


def _raise_file_limit() -> None:
    """Each request under way has a socket; the soft limit is often 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _SOCKETS if hard == resource.RLIM_INFINITY else min(_SOCKETS, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))

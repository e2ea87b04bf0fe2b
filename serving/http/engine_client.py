"""The HTTP process's side of the engine: sends requests, routes its outputs, notices its death."""

from __future__ import annotations

import asyncio
import contextlib
import math
import signal
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from typing import TypeVar

from .. import wire
from ..request import Output, Request
from .errors import ApiError, engine_down, queue_full, unavailable
from .launch import LaunchedEngine
from .metrics import Metrics

T = TypeVar("T")

TAIL_LINES = 30
_EXIT_SECONDS = 5.0


class EngineError(OSError):
    """The engine process could not start, or died. The message says why and shows its last words."""


class Generation:
    """The outputs of one group of requests, in the order they come; ends when each of them has finished."""

    def __init__(self, ids: Sequence[str]) -> None:
        self.unfinished = set(ids)
        self.queue: asyncio.Queue[Output | ApiError] = asyncio.Queue()

    async def __aiter__(self) -> AsyncIterator[Output]:
        while self.unfinished:
            item = await self.queue.get()
            if isinstance(item, ApiError):
                raise item
            if item.finish_reason is not None:
                self.unfinished.discard(item.request_id)
            yield item


class EngineClient:
    """One engine process. `start`, then `generate` any number of times, then `stop`.

    - `ready` is None until the engine takes requests; `failure` is None while it lives.
    - `draining` makes new requests fail with 503; those in flight go on.
    """

    def __init__(
        self,
        launched: LaunchedEngine,
        settings: wire.EngineSettings,
        metrics: Metrics,
        *,
        on_progress: Callable[[wire.Progress], None] | None = None,
        on_log: Callable[[str], None] | None = None,
    ) -> None:
        self.ready: wire.Ready | None = None
        self.failure: str | None = None
        self.draining = False
        self.progress = wire.Progress("starting")
        self.died = asyncio.Event()
        self._launched = launched
        self._settings = settings
        self._metrics = metrics
        self._on_progress = on_progress
        self._on_log = on_log
        self._is_ready = asyncio.Event()
        self._tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._generations: dict[str, Generation] = {}
        self._admissions: dict[int, asyncio.Future[wire.Admitted | wire.Rejected]] = {}
        self._group = 0
        self._writer: asyncio.StreamWriter | None = None
        self._exit: asyncio.Task[int] | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._stopping = False
        self._failed: wire.Failed | None = None

    @property
    def in_flight(self) -> int:
        return len(self._generations)

    # -- life ---------------------------------------------------------------------------------------------------------

    async def start(self) -> wire.Ready:
        """Talk to the process and wait until it is ready. Raises EngineError."""
        connected: asyncio.Future[asyncio.StreamReader] = asyncio.get_running_loop().create_future()

        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            if connected.done():
                writer.close()
                return
            self._writer = writer
            connected.set_result(reader)

        self._exit = asyncio.create_task(asyncio.to_thread(self._launched.process.wait))
        logs = asyncio.create_task(self._read_logs())
        self._tasks += [logs, asyncio.create_task(self._watch(self._exit, logs))]
        server = await asyncio.start_unix_server(accept, sock=self._launched.listener)
        try:
            reader = await self._unless_died(connected)
        finally:
            server.close()
        self._tasks.append(asyncio.create_task(self._read_messages(reader, self._exit)))
        self._send(wire.Start(self._settings))
        await self._unless_died(asyncio.ensure_future(self._is_ready.wait()))
        assert self.ready is not None
        return self.ready

    async def stop(self) -> None:
        """Ask the process to leave, and insist after a while. Safe to call in any state, and twice."""
        self._stopping = True
        self.fail_all(unavailable("The server is shutting down.", "shutting_down"))
        if self._exit is not None and not self._exit.done():
            # Before it is ready the process has no loop that could answer; it holds nothing worth saving either.
            if self.ready is not None:
                self._send(wire.Shutdown())
                await asyncio.wait([self._exit], timeout=_EXIT_SECONDS)
            if not self._exit.done():
                self._launched.process.kill()
                await self._exit
        if self._writer is not None:
            self._writer.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _unless_died(self, future: asyncio.Future[T]) -> T:
        died = asyncio.create_task(self.died.wait())
        try:
            await asyncio.wait([future, died], return_when=asyncio.FIRST_COMPLETED)
            if not future.done():
                raise EngineError(self.failure)
            return future.result()
        finally:
            died.cancel()
            future.cancel()

    async def _watch(self, exited: asyncio.Task[int], logs: asyncio.Task[None]) -> None:
        code = await asyncio.shield(exited)
        with contextlib.suppress(TimeoutError):  # a grandchild may hold the pipe open
            await asyncio.wait_for(asyncio.shield(logs), 1.0)
        if self._failed is not None and self._failed.user_error:
            self.failure = self._failed.message
        else:
            self.failure = f"the engine process {_how_it_ended(code)}"
            if self._failed is not None:
                self.failure += f": {self._failed.message}"
            if self._tail:
                self.failure += "\nIts last lines:\n" + "\n".join(f"  {line}" for line in self._tail)
        self.died.set()
        if not self._stopping:
            self.fail_all(engine_down("The engine died while it worked on this request; the server is going down."))

    async def _read_logs(self) -> None:
        reader, rest = asyncio.StreamReader(), b""
        loop = asyncio.get_running_loop()
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), self._launched.process.stdout)
        while chunk := await reader.read(1 << 16):
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                self._log(line)
        if rest:
            self._log(rest)

    def _log(self, line: bytes) -> None:
        text = line.decode("utf-8", "replace").rstrip()
        self._tail.append(text[:2000])
        if self._on_log is not None:
            self._on_log(text)

    # -- messages -----------------------------------------------------------------------------------------------------

    def _send(self, message: wire.ToEngine) -> None:
        assert self._writer is not None
        if not self._writer.is_closing():
            self._writer.write(wire.frame(message))

    async def _read_messages(self, reader: asyncio.StreamReader, exited: asyncio.Task[int]) -> None:
        try:
            while (message := await wire.receive(reader)) is not None:
                self._handle(message)
        except wire.WireError as error:
            self._tail.append(f"(the HTTP process: {error})")
        # The stream ended: the process is leaving, or is beyond talking to.
        await asyncio.wait([exited], timeout=_EXIT_SECONDS)
        if not exited.done():
            self._launched.process.kill()

    def _handle(self, message: wire.FromEngine) -> None:
        match message:
            case wire.Step():
                self._metrics.stats = message.stats
                for output in message.outputs:
                    self._route(output)
            case wire.Admitted() | wire.Rejected():
                future = self._admissions.pop(message.group, None)
                if future is not None and not future.done():
                    future.set_result(message)
            case wire.Progress():
                self.progress = message
                if self._on_progress is not None:
                    self._on_progress(message)
            case wire.Ready():
                self.ready = message
                self._is_ready.set()
            case wire.Failed():
                self._failed = message

    def _route(self, output: Output) -> None:
        generation = self._generations.get(output.request_id)
        if generation is None:  # cancelled meanwhile
            return
        self._metrics.output(output)
        if output.finish_reason is not None:
            del self._generations[output.request_id]
        if output.finish_reason == "error":
            generation.queue.put_nowait(engine_down(output.error or "The engine failed on this request."))
        elif output.finish_reason == "cancelled":
            generation.queue.put_nowait(unavailable("The request was cancelled by the server.", "cancelled"))
        else:
            generation.queue.put_nowait(output)

    def fail_all(self, error: ApiError) -> None:
        """End every request in flight with `error`."""
        for future in self._admissions.values():
            if not future.done():
                future.set_exception(error)
        self._admissions.clear()
        for generation in set(self._generations.values()):
            generation.queue.put_nowait(error)

    # -- requests -----------------------------------------------------------------------------------------------------

    @property
    def info(self) -> wire.Ready:
        """What the engine said of itself. Raises a 503 before it has, and after its death."""
        if self.failure is not None:
            raise unavailable("The engine died; the server is going down.", "engine_dead")
        if self.ready is None:
            raise unavailable(f"The model is loading ({describe(self.progress)}).", "loading", retry_after=5)
        return self.ready

    def check_open(self) -> wire.Ready:
        """`info`, or the 503 that says why no new request is taken now."""
        if self.draining or self._stopping:
            raise unavailable("The server is shutting down.", "shutting_down", retry_after=10)
        return self.info

    @contextlib.asynccontextmanager
    async def generate(self, requests: list[Request]) -> AsyncIterator[Generation]:
        """Admit the group and iterate over its outputs. Leaving the block early cancels what has not finished.

        Raises ApiError: 429 when the queue is full, 400 when a request can never run, 5xx when the engine is gone.
        """
        ready = self.check_open()
        if self.in_flight + len(requests) > ready.max_running + ready.max_waiting:
            raise self._queue_full(ready)
        generation = Generation([request.id for request in requests])
        future: asyncio.Future[wire.Admitted | wire.Rejected] = asyncio.get_running_loop().create_future()
        self._group += 1
        group = self._group
        self._admissions[group] = future
        for request in requests:
            self._generations[request.id] = generation
            self._metrics.start(request)
        try:
            self._send(wire.Add(group, requests))
            answer = await future
            if isinstance(answer, wire.Rejected):
                for request in requests:
                    self._generations.pop(request.id, None)
                    self._metrics.forget(request.id)
                if answer.queue_full:
                    raise self._queue_full(ready)
                raise ApiError(400, answer.message, param=answer.param, code="invalid_value")
            yield generation
        finally:
            self._admissions.pop(group, None)
            # Asked of the table and not of the generation: its reader may be behind.
            left = [request.id for request in requests if self._generations.pop(request.id, None) is not None]
            if left:
                for request_id in left:
                    self._metrics.aborted(request_id)
                if self.failure is None:
                    self._send(wire.Cancel(left))

    def _queue_full(self, ready: wire.Ready) -> ApiError:
        # How long until a place is free, were all requests as long as the last ones.
        seconds = self._metrics.mean_seconds / ready.max_running
        retry_after = min(max(math.ceil(seconds), 1), 60)
        message = f"The queue is full ({self.in_flight} requests running or waiting). Try again in {retry_after} s."
        return queue_full(retry_after, message)


def describe(progress: wire.Progress) -> str:
    """`warming up 3/12`."""
    return progress.stage + (f" {progress.done}/{progress.total}" if progress.total else "")


def _how_it_ended(code: int) -> str:
    if code >= 0:
        return f"exited with status {code}"
    with contextlib.suppress(ValueError):
        name = signal.Signals(-code).name
        return f"was killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    return f"was killed by signal {-code}"

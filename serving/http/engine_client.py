"""The HTTP process's side of the engine: keeps one running, sends requests, routes its outputs."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import time
from collections.abc import AsyncIterator, Callable

import msgspec

from ...checkpoints.tokenizer import Tokenizer
from .. import wire
from ..request import Output, Request
from .engine_life import MOST_BACKLOG, Death, EngineLife
from .errors import ApiError, engine_down, grammar_failed, queue_full, unavailable
from .generation import Generation
from .launch import LaunchedEngine
from .metrics import Metrics
from .restarts import WINDOW_SECONDS, RestartPolicy

_EXIT_SECONDS = 5.0


class EngineError(OSError):
    """There is no engine and there will be none. The message says why and shows the last one's last words."""


class EngineClient:
    """`run` keeps an engine running until `stop`; meanwhile `generate` any number of times.

    When the engine dies another one is started, and is given the requests that were in flight (`Generation` says how
    they go on). New ones wait for it in the same queue: a restart takes seconds, and the queue has a limit and its 429.

    - `ready` is None until the first engine takes requests; `failure` is None until there will be none any more;
    - `is_up`: an engine takes requests now;
    - `draining` makes new requests fail with 503, `paused` keeps them in the queue; those in flight go on.
    """

    def __init__(
        self,
        launched: LaunchedEngine,
        settings: wire.EngineSettings,
        metrics: Metrics,
        *,
        launch: Callable[[], LaunchedEngine] = LaunchedEngine,
        max_restarts: int,
        hang_seconds: float,
        on_progress: Callable[[wire.Progress], None] | None = None,
        on_log: Callable[[str], None] | None = None,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.ready: wire.Ready | None = None
        self.failure: str | None = None
        self.draining = False
        self.paused = self.held = False
        self.is_up = False
        self.started = asyncio.Event()
        self.progress = wire.Progress("starting")
        self.settings = settings
        self.last_death: str | None = None
        self._launched = launched
        self._launch = launch
        self.metrics = metrics
        self._restarts = RestartPolicy(max_restarts)
        self._hang_seconds = hang_seconds
        self._on_progress = on_progress
        self._on_log = on_log
        self._say = say
        self._life: EngineLife | None = None
        self._since = time.monotonic()
        self._groups: dict[int, Generation] = {}  # those that have not ended, oldest first
        self._owners: dict[str, Generation] = {}  # of each request that has not ended
        self._calls: dict[int, asyncio.Future[str]] = {}
        self._numbers = itertools.count(1)
        self._stopping = asyncio.Event()
        self._tokenizer: Tokenizer | None = None

    @property
    def in_flight(self) -> int:
        return len(self._owners)

    @property
    def state(self) -> tuple[str, str | None]:
        """`ok`, `loading` or `restarting` (with the stage), `paused`, `stopping` or `dead`."""
        if self.failure is not None:
            return "dead", None
        if self.draining:
            return "stopping", None
        if not self.is_up:
            return "loading" if self.ready is None else "restarting", describe(self.progress)
        return "paused" if self.paused else "ok", None

    @property
    def pid(self) -> int | None:
        """Of the engine process; None between two of them."""
        return None if self._life is None else self._life.pid

    # -- life ---------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Until `stop`. Raises EngineError when the first engine does not start, or too many have died."""
        launched = self._launched
        while True:
            death = await self._live(launched)
            if self._stopping.is_set() or (self.draining and not self.in_flight):
                return
            delay = self._died(death)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), delay)
            if self._stopping.is_set():  # also when `stop` came between two engines and found none
                return
            launched = None

    async def _live(self, launched: LaunchedEngine | None) -> Death:
        try:
            launched = launched or self._launch()
        except OSError as error:  # no memory, perhaps: what killed the last one
            return Death(f"the engine process could not be started: {error}")
        self._life = EngineLife(
            launched,
            self.settings,
            hang_seconds=self._hang_seconds,
            expects=lambda: not self.held and any(group.sent for group in self._groups.values()),
            on_message=self._handle,
            on_log=self._on_log,
        )
        try:
            return await self._life.run()
        finally:
            self._life, self.is_up = None, False
            self.metrics.stats = wire.Stats()

    def _died(self, death: Death) -> float:
        """How long to wait before the next start. Raises EngineError when there is none."""
        first = self.ready is None
        self.last_death = death.message
        delay = None if first or death.user_error else self._restarts.delay(time.monotonic())
        self._fail_calls(unavailable("The engine died meanwhile.", "engine_restarted"))
        if delay is None:
            self.failure = death.message
            if not first and not death.user_error and self._restarts.most:
                most, minutes = self._restarts.most, WINDOW_SECONDS / 60
                self.failure = (
                    f"the engine died {most + 1} times within {minutes:g} minutes and is not started again "
                    f"(max_restarts={most}); the last time {death.message}"
                )
            message = "The engine died while it worked on this request; the server is going down."
            self.fail_all(unavailable(message, "engine_dead"))
            raise EngineError(self.failure)
        replayed = 0
        for group in list(self._groups.values()):
            count = len(group.left) if group.sent else 0
            try:
                group.engine_died()
                replayed += count
            except ApiError as error:
                self._fail(group, error)
        self.metrics.restarts += 1
        self.metrics.replays += replayed
        self.progress = wire.Progress("restarting")
        soon = f" in {delay:g} s" if delay else ""
        what = death.message.splitlines()[0]  # the log has its last words
        self._say(f"{what}; starting it again{soon}, with {replayed} requests of the old one")
        self._since = time.monotonic()
        return delay

    async def stop(self) -> None:
        """End the requests in flight and the engine; `run` returns within seconds. Safe to call in any state, twice."""
        self._stopping.set()
        self.fail_all(unavailable("The server is shutting down.", "shutting_down"))
        life = self._life
        if life is not None:
            life.leave()
            for _ in range(int(_EXIT_SECONDS / 0.02)):
                if self._life is not life:
                    return
                await asyncio.sleep(0.02)
            life.kill()

    # -- messages -----------------------------------------------------------------------------------------------------

    def _handle(self, message: wire.FromEngine) -> None:
        match message:
            case wire.Step():
                self.metrics.stats = message.stats
                for output in message.outputs:
                    self._route(output)
            case wire.Admitted():
                group = self._groups.get(message.group)
                if group is not None and not group.admitted.done():
                    group.admitted.set_result(None)
            case wire.Rejected():
                group = self._groups.get(message.group)
                if group is not None:
                    error = ApiError(400, message.message, param=message.param, code="invalid_value")
                    self._fail(group, self._queue_full() if message.queue_full else error, rejected=True)
            case wire.Progress():
                if message != self.progress:
                    self.progress = message
                    if self._on_progress is not None:
                        self._on_progress(message)
            case wire.Ready():
                self._is_ready(message)
            case wire.Done():
                future = self._calls.pop(message.call, None)
                if future is not None and not future.done():
                    if message.error is None:
                        future.set_result(message.text)
                    else:
                        future.set_exception(ApiError(409, message.error, code="refused"))
            case wire.Failed():
                pass  # its death, which comes next, tells

    def _is_ready(self, ready: wire.Ready) -> None:
        first, self.ready, self.is_up = self.ready is None, ready, True
        self.started.set()
        if not first:
            seconds = time.monotonic() - self._since
            self._say(f"ready again in {seconds:.1f} s ({self._restarts.total} restarts so far)")
        if self.held:
            self._send(wire.Hold(True))
        self._send_waiting()

    def _route(self, output: Output) -> None:
        group = self._owners.get(output.request_id)
        if group is None:  # cancelled meanwhile
            return
        running = output.finish_reason is None
        try:
            if output.finish_reason == "error" and output.error_kind == "grammar":
                raise grammar_failed(output.error or "The grammar can't be followed.")
            if output.finish_reason == "error":
                raise engine_down(output.error or "The engine failed on this request.")
            if output.finish_reason == "cancelled":
                raise unavailable("The request was cancelled by the server.", "cancelled")
            if not group.feed(output):
                return
        except ApiError as error:
            self._fail(group, error)
            return
        self.metrics.output(output)
        if output.finish_reason is not None:
            self._restarts.useful()
            del self._owners[output.request_id]
            if running:
                self._send(wire.Cancel([output.request_id], complete=True))
            if not group.left:
                del self._groups[group.number]

    def _send(self, message: wire.ToEngine) -> None:
        if self._life is not None and self.is_up:
            self._life.send(message)

    def _send_waiting(self) -> None:
        """Give the engine what it has not got, in the order of arrival."""
        if not self.is_up or self.paused:
            return
        for group in self._groups.values():
            if not group.sent:
                group.sent = True
                self._send(wire.Add(group.number, group.left))

    def _forget(self, group: Generation) -> list[str]:
        """Out of all tables; names of the requests that had not ended."""
        self._groups.pop(group.number, None)
        return [name for name in group.ids if self._owners.pop(name, None) is not None]

    def _fail(self, group: Generation, error: ApiError, *, rejected: bool = False) -> None:
        """End all of it, here and in the engine."""
        left = self._forget(group)
        for name in left:
            if rejected:
                self.metrics.forget(name)
            else:
                self.metrics.aborted(name)
        if group.sent and left and not rejected:
            self._send(wire.Cancel(left))
        group.fail(error)

    def _fail_calls(self, error: ApiError) -> None:
        for future in self._calls.values():
            if not future.done():
                future.set_exception(error)
        self._calls.clear()

    def fail_all(self, error: ApiError) -> None:
        """End every request in flight with `error`."""
        for group in list(self._groups.values()):
            self._fail(group, error)
        self._fail_calls(error)

    # -- requests -----------------------------------------------------------------------------------------------------

    @property
    def info(self) -> wire.Ready:
        """What the engine said of itself. Raises a 503 before it has, and after the last one's death."""
        if self.failure is not None:
            raise unavailable("The engine died; the server is going down.", "engine_dead")
        if self.ready is None:
            raise unavailable(f"The model is loading ({describe(self.progress)}).", "loading", retry_after=5)
        return self.ready

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's. Raises a 503 before the engine has reported it."""
        if self._tokenizer is None:
            self._tokenizer = Tokenizer.from_files(self.info.tokenizer_files, where=self.settings.model)
            self._tokenizer.keep_no_words()
        return self._tokenizer

    def check_open(self) -> wire.Ready:
        """`info`, or the 503 that says why no new request is taken now."""
        if self.draining or self._stopping.is_set():
            raise unavailable("The server is shutting down.", "shutting_down", retry_after=10)
        return self.info

    def check_room(self, count: int = 1) -> None:
        """Raises what `check_open` does, and 429 when there is no room for so many more requests."""
        ready = self.check_open()
        backlog = 0 if self._life is None else self._life.backlog
        if self.in_flight + count > ready.max_running + ready.max_waiting or backlog > MOST_BACKLOG:
            raise self._queue_full()

    @contextlib.asynccontextmanager
    async def generate(self, requests: list[Request]) -> AsyncIterator[Generation]:
        """Admit the group and iterate over its outputs. Leaving the block early cancels what has not finished.

        Raises ApiError: 429 when the queue is full, 400 when a request can never run, 5xx when the engine is gone.
        """
        self.check_room(len(requests))
        group = Generation(next(self._numbers), requests, self.tokenizer)
        self._groups[group.number] = group
        for request in requests:
            self._owners[request.id] = group
            self.metrics.start(request)
        try:
            self._send_waiting()
            await group.admitted
            yield group
        finally:
            left = self._forget(group)
            for name in left:
                self.metrics.aborted(name)
            if left and group.sent:
                self._send(wire.Cancel(left))

    def _queue_full(self) -> ApiError:
        # How long until a place is free, were all requests as long as the last ones.
        seconds = self.metrics.mean_seconds / self.info.max_running
        retry_after = min(max(math.ceil(seconds), 1), 60)
        message = f"The queue is full ({self.in_flight} requests running or waiting). Try again in {retry_after} s."
        return queue_full(retry_after, message)

    # -- administration -----------------------------------------------------------------------------------------------

    def pause(self, hold: bool) -> None:
        """Send no more requests to the engine; `hold`: it does not work on those that it has either."""
        self.paused, self.held = True, hold
        self._send(wire.Hold(hold))

    def resume(self) -> None:
        self.paused = self.held = False
        self._send(wire.Hold(False))
        self._send_waiting()

    async def reload(self, path: str) -> str:
        """Other weights for the same model, also in engines to come. Raises ApiError (409: all is as it was)."""
        text = await self._call(lambda call: wire.Reload(call, path))
        self.settings = msgspec.structs.replace(self.settings, model=path)
        return text

    async def profile(self, folder: str, seconds: float) -> str:
        """A profile of the engine's next seconds, into `folder`. Raises ApiError."""
        return await self._call(lambda call: wire.Profile(call, folder, seconds))

    async def _call(self, message: Callable[[int], wire.ToEngine]) -> str:
        if not self.is_up:
            raise unavailable("There is no engine now; ask /status, and try again when it is up.", "engine_restarted")
        call = next(self._numbers)
        future = self._calls[call] = asyncio.get_running_loop().create_future()
        self._send(message(call))
        try:
            return await future
        finally:
            self._calls.pop(call, None)


def describe(progress: wire.Progress) -> str:
    """`warming up 3/12`."""
    return progress.stage + (f" {progress.done}/{progress.total}" if progress.total else "")

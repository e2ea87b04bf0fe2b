"""The running server: start-up, signals, the ready line, and leaving in order."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import ipaddress
import signal
import socket
import threading
import time
from collections.abc import Iterator
from typing import TextIO

import uvicorn
import uvloop

from .. import wire
from .admin import create_admin
from .app import create_app
from .config import ServeConfig
from .engine_client import EngineClient, EngineError, describe
from .errors import unavailable
from .file_routes import keep
from .keys import ApiKeys
from .launch import LaunchedEngine
from .metrics import Metrics
from .protocol import Protocol
from .service import Service

_LAST_SECONDS = 3.0  # for answers that say why they end, after the drain is over


def run(
    config: ServeConfig,
    listener: socket.socket,
    admin: socket.socket | None,
    engine: LaunchedEngine,
    begin: float,
    out: TextIO,
    err: TextIO,
) -> None:
    """`serve`, on listening sockets, with an engine process that has been started. `begin`: when the start began."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_Server(config, begin, out, err).run(listener, admin, engine))


def engine_settings(config: ServeConfig) -> wire.EngineSettings:
    names = [name for name in wire.EngineSettings.__struct_fields__ if name != "model"]
    return wire.EngineSettings(model=config.model, **{name: getattr(config, name) for name in names})


class _Server:
    def __init__(self, config: ServeConfig, begin: float, out: TextIO, err: TextIO) -> None:
        self._config = config
        self._begin = begin
        self._out = out
        self._err = err
        self._signals: list[float] = []  # when each came
        self._stop = asyncio.Event()
        self._force = asyncio.Event()

    def _say(self, text: str) -> None:
        print(f"twinax: {text}", file=self._err, flush=True)

    async def run(self, listener: socket.socket, admin: socket.socket | None, launched: LaunchedEngine) -> None:
        config = self._config
        metrics = Metrics()
        engine = EngineClient(
            launched,
            engine_settings(config),
            metrics,
            max_restarts=config.max_restarts,
            hang_seconds=config.hang_seconds,
            say=self._say,
            on_progress=lambda progress: self._say(describe(progress)),
            on_log=lambda line: print(line, file=self._err, flush=True),
        )
        service = Service(engine, metrics, config.model_id, config.max_body_bytes)
        kept = keep(service, config)
        web = _Web(
            uvicorn.Config(
                create_app(service, ApiKeys(config.tenants()), config.stall_seconds, kept),
                http=Protocol,
                ws="none",
                lifespan="off",
                log_level=config.log_level,
                access_log=config.log_level in ("info", "debug", "trace"),
                server_header=False,
                timeout_keep_alive=65,  # longer than the idle time of proxies and clients, so that they close first
                timeout_graceful_shutdown=int(config.drain_seconds + _LAST_SECONDS + 1),
            )
        )
        self._warn()
        with self._handle_signals():
            serving = asyncio.create_task(web.serve(sockets=[listener]))
            supervision = asyncio.create_task(engine.run())
            tasks = [serving, supervision]
            batches = None if kept is None else asyncio.create_task(kept.batches.run())
            if batches is not None:
                tasks.append(batches)
            if admin is not None:
                tasks.append(asyncio.create_task(_admin_web(engine, self._stop).serve(sockets=[admin])))
            try:
                await self._until_stopped(engine, supervision, listener, serving)
                if batches is not None:
                    batches.cancel()  # the next server goes on with them
                await self._drain(engine, supervision, web)
                if supervision.done():
                    supervision.result()
            finally:
                # Also on the way out with an error: let answers in flight say what happened.
                web.should_exit = True
                await asyncio.wait([serving], timeout=_LAST_SECONDS)
                await engine.stop()
                for task in tasks:
                    if task is not supervision:
                        task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _until_stopped(
        self,
        engine: EngineClient,
        supervision: asyncio.Task[None],
        listener: socket.socket,
        serving: asyncio.Task[None],
    ) -> None:
        """Returns on a signal; raises EngineError when the engine does not start, or has died too often."""
        _keep_all()  # while the engine starts; what comes with its first words is little
        stop, started = asyncio.create_task(self._stop.wait()), asyncio.create_task(engine.started.wait())
        try:
            await asyncio.wait([supervision, stop, started, serving], return_when=asyncio.FIRST_COMPLETED)
            if started.done():
                self._ready(listener, engine.info)
                _keep_all()
                await asyncio.wait([supervision, stop, serving], return_when=asyncio.FIRST_COMPLETED)
            if supervision.done() and not stop.done():
                supervision.result()
            if serving.done():
                serving.result()
                raise EngineError("the HTTP server ended by itself")
        finally:
            for task in (stop, started):
                task.cancel()
            await asyncio.gather(stop, started, return_exceptions=True)

    async def _drain(self, engine: EngineClient, supervision: asyncio.Task[None], web: uvicorn.Server) -> None:
        """After a signal for `drain_seconds` at most; asked for on the admin socket, until all is done or a signal."""
        engine.draining = True
        engine.resume()
        if not self._signals:
            web.config.timeout_graceful_shutdown = None
        web.should_exit = True  # closes the listening socket and idle connections
        if engine.in_flight:
            seconds = self._config.drain_seconds
            limit = f" for {seconds:g} s (signal again to cut them)" if self._signals else " until they end"
            self._say(f"stopping; {engine.in_flight} requests may go on{limit}")
            while engine.in_flight and not supervision.done() and not self._force.is_set():
                if self._signals and time.monotonic() >= self._signals[0] + seconds:
                    break
                await asyncio.sleep(0.02)
            if engine.in_flight:
                self._say(f"cancelling {engine.in_flight} requests")
                engine.fail_all(unavailable("The server is shutting down.", "shutting_down"))
        self._say("stopped")

    def _ready(self, listener: socket.socket, ready: wire.Ready) -> None:
        host, port = listener.getsockname()[:2]
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
        total = time.perf_counter() - self._begin
        print(
            f"twinax: ready at http://{host}:{port}/v1 in {total:.1f} s (model '{self._config.model_id}', "
            f"context {ready.max_model_len}, loaded in {ready.load_seconds:.1f} s, "
            f"compiled in {ready.warmup_seconds:.1f} s)",
            file=self._out,
            flush=True,
        )

    def _warn(self) -> None:
        """Of what is allowed and hardly meant."""
        host, tenants = self._config.host, self._config.tenants()
        if self._config.scheduler == "fair" and len(tenants) < 2:
            self._say("warning: the scheduler 'fair' is fair between API keys, and there are not two; give --api-keys")
        try:
            local = ipaddress.ip_address(host).is_loopback
        except ValueError:
            local = host == "localhost"
        if not local and not tenants:
            self._say(f"warning: {host} is reachable from other machines and there is no API key; set TWINAX_API_KEY")

    @contextlib.contextmanager
    def _handle_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread may; whoever runs us in another one stops the process
            return

        def handle() -> None:
            self._signals.append(time.monotonic())
            (self._stop if len(self._signals) == 1 else self._force).set()

        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, handle)
        try:
            yield
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)


def _keep_all() -> None:
    """What is here now stays; to look at it again and again would hold up answers for a tenth of a second."""
    gc.collect()
    gc.freeze()


def _admin_web(engine: EngineClient, drain: asyncio.Event) -> uvicorn.Server:
    app = create_admin(engine, drain.set)
    return _Web(uvicorn.Config(app, http="httptools", ws="none", lifespan="off", log_level="warning", access_log=False))


class _Web(uvicorn.Server):
    """uvicorn without its signal handlers: `_Server` decides when it leaves."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

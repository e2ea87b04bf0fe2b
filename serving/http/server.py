"""`serve`: one model behind an OpenAI-style HTTP server, until a signal or the death of the engine."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

import uvicorn
import uvloop

from .. import wire
from .app import create_app
from .engine_client import EngineClient, EngineError, describe
from .errors import unavailable
from .metrics import Metrics
from .service import Service

_LOG_LEVELS = ("critical", "error", "warning", "info", "debug", "trace")
_LAST_SECONDS = 3.0  # for answers that say why they end, after the drain is over


class PortInUse(OSError):
    """Another program listens on the port."""


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """What `serve` serves, where, and within which limits. None leaves a limit to the engine's default.

    Attributes:
      model: a Twinax step or run folder, or a Hugging Face folder.
      host: the address to listen on; only this machine can reach the default.
      port: 0 picks a free one, which the ready line names.
      api_key: demanded on every route but /health; default: the environment variable TWINAX_API_KEY, if set.
      served_model_name: the name that requests give as `model`; default: the folder's name.
      max_running: requests decoded together.
      max_waiting: requests that may queue; more are answered 429.
      max_model_len: tokens of prompt and completion together; at most, and by default, the model's own context.
      dtype: of weights and compute, "float32" or "bfloat16".
      page_size, num_pages, cache_bytes: the paged cache; `num_pages` pages of `page_size` tokens, or a size in bytes.
      chunk_tokens: prompt tokens computed per step.
      compile_cache: folder that keeps compiled programs between starts.
      max_body_bytes: larger request bodies are answered 413.
      drain_seconds: how long requests in flight may go on after SIGTERM or Ctrl-C.
      log_level: one of critical, error, warning, info, debug, trace; requests are logged from info on.
    """

    model: str
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = field(default=None, repr=False)
    served_model_name: str | None = None
    max_running: int | None = None
    max_waiting: int | None = None
    max_model_len: int | None = None
    dtype: str | None = None
    page_size: int | None = None
    num_pages: int | None = None
    cache_bytes: int | None = None
    chunk_tokens: int | None = None
    compile_cache: str | None = None
    max_body_bytes: int = 32 << 20
    drain_seconds: float = 30.0
    log_level: str = "warning"

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port must be between 0 and 65535 (0 picks a free one), got {self.port}")
        if self.log_level not in _LOG_LEVELS:
            raise ValueError(f"log_level must be one of {', '.join(_LOG_LEVELS)}, got {self.log_level!r}")
        if self.max_body_bytes < 1:
            raise ValueError(f"max_body_bytes must be at least 1, got {self.max_body_bytes}")
        if not 0 <= self.drain_seconds <= 3600:
            raise ValueError(f"drain_seconds must be between 0 and 3600, got {self.drain_seconds}")
        key = self.resolved_api_key
        if key is not None and not (key.isascii() and key.isprintable() and key.strip() == key and key):
            raise ValueError("api_key must be printable ASCII without spaces around it, and not empty; choose another")

    @property
    def resolved_api_key(self) -> str | None:
        return self.api_key if self.api_key is not None else os.environ.get("TWINAX_API_KEY")

    @property
    def model_id(self) -> str:
        if self.served_model_name is not None:
            return self.served_model_name
        folder = Path(self.model).expanduser().resolve()
        if re.fullmatch(r"step_\d+", folder.name):
            return f"{folder.parent.name}-{folder.name}"
        return folder.name or "model"

    def engine_settings(self) -> wire.EngineSettings:
        names = [name for name in wire.EngineSettings.__struct_fields__ if name != "model"]
        return wire.EngineSettings(model=self.model, **{name: getattr(self, name) for name in names})


def serve(config: ServeConfig, *, out: TextIO | None = None, err: TextIO | None = None) -> None:
    """Serve until SIGTERM or Ctrl-C; then stop accepting, let requests finish for `drain_seconds`, and return.

    Progress and warnings go to `err` (standard error), the ready line to `out` (standard output).

    Raises:
      PortInUse, OSError: the address can't be listened on (checked before the model is loaded).
      EngineError: the model can't be loaded, or the engine died.
    """
    if not Path(config.model).expanduser().exists():
        message = f"there is no model at {config.model}; give a checkpoint, a run folder or a Hugging Face folder"
        raise FileNotFoundError(message)
    server = _Server(config, out or sys.stdout, err or sys.stderr)
    with (
        contextlib.closing(listen(config.host, config.port)) as listener,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        runner.run(server.run(listener))


def listen(host: str, port: int) -> socket.socket:
    """A listening TCP socket. Raises PortInUse, or OSError for an address that is not of this machine."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as error:
        raise OSError(f"can't listen on host {host!r}: {error.strerror}; use 127.0.0.1, 0.0.0.0 or ::") from None
    sock = socket.socket(family, kind, proto)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(2048)
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            raise PortInUse(
                f"port {port} on {host} is in use by another program; stop it, or choose another with --port "
                "(--port 0 picks a free one)"
            ) from None
        if error.errno == errno.EACCES:
            raise OSError(f"no permission to listen on port {port} of {host}; use a port above 1023") from None
        raise OSError(f"can't listen on {host} port {port}: {error.strerror}; check --host") from None
    sock.setblocking(False)
    return sock


class _Server:
    def __init__(self, config: ServeConfig, out: TextIO, err: TextIO) -> None:
        self._config = config
        self._out = out
        self._err = err
        self._begin = time.perf_counter()
        self._signals = 0
        self._stop = asyncio.Event()
        self._force = asyncio.Event()

    def _say(self, text: str) -> None:
        print(f"twinax: {text}", file=self._err, flush=True)

    async def run(self, listener: socket.socket) -> None:
        config = self._config
        metrics = Metrics()
        engine = EngineClient(
            config.engine_settings(),
            metrics,
            on_progress=lambda progress: self._say(describe(progress)),
            on_log=lambda line: print(line, file=self._err, flush=True),
        )
        service = Service(engine, metrics, config.model_id, config.max_body_bytes)
        web = _Web(
            uvicorn.Config(
                create_app(service, config.resolved_api_key),
                http="httptools",
                ws="none",
                lifespan="off",
                log_level=config.log_level,
                access_log=config.log_level in ("info", "debug", "trace"),
                server_header=False,
                timeout_keep_alive=65,  # longer than the idle time of proxies and clients, so that they close first
                timeout_graceful_shutdown=int(config.drain_seconds + _LAST_SECONDS + 1),
            )
        )
        self._warn_if_open()
        with self._handle_signals():
            serving = asyncio.create_task(web.serve(sockets=[listener]))
            try:
                await self._until_stopped(engine, listener, serving)
                await self._drain(engine, web)
            finally:
                # Also on the way out with an error: let answers in flight say what happened.
                web.should_exit = True
                await asyncio.wait([serving], timeout=_LAST_SECONDS)
                serving.cancel()
                await engine.stop()
                await asyncio.gather(serving, return_exceptions=True)

    async def _until_stopped(self, engine: EngineClient, listener: socket.socket, serving: asyncio.Task[None]) -> None:
        """Returns on a signal; raises EngineError when the engine does not start or dies."""
        stop, died = asyncio.create_task(self._stop.wait()), asyncio.create_task(engine.died.wait())
        start = asyncio.create_task(engine.start())
        try:
            await asyncio.wait([start, stop, serving], return_when=asyncio.FIRST_COMPLETED)
            if start.done():
                ready = start.result()
                self._ready(listener, ready)
                await asyncio.wait([stop, died, serving], return_when=asyncio.FIRST_COMPLETED)
                if died.done() and not stop.done():
                    raise EngineError(engine.failure)
            if serving.done():
                serving.result()
                raise EngineError("the HTTP server ended by itself")
        finally:
            for task in (stop, died, start):
                task.cancel()
            await asyncio.gather(stop, died, start, return_exceptions=True)

    async def _drain(self, engine: EngineClient, web: uvicorn.Server) -> None:
        engine.draining = True
        web.should_exit = True  # closes the listening socket and idle connections
        if engine.in_flight:
            seconds = self._config.drain_seconds
            self._say(f"stopping; {engine.in_flight} requests may go on for {seconds:g} s (signal again to cut them)")
            deadline = time.monotonic() + seconds
            while engine.in_flight and time.monotonic() < deadline and not self._force.is_set():
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

    def _warn_if_open(self) -> None:
        host = self._config.host
        try:
            local = ipaddress.ip_address(host).is_loopback
        except ValueError:
            local = host == "localhost"
        if not local and self._config.resolved_api_key is None:
            self._say(f"warning: {host} is reachable from other machines and there is no API key; set TWINAX_API_KEY")

    @contextlib.contextmanager
    def _handle_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread may; whoever runs us in another one stops the process
            return

        def handle() -> None:
            self._signals += 1
            (self._stop if self._signals == 1 else self._force).set()

        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, handle)
        try:
            yield
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)


class _Web(uvicorn.Server):
    """uvicorn without its signal handlers: `_Server` decides when it leaves."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

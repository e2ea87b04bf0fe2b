"""One engine process, from its start to its death: what it says, what it prints, and whether it still moves."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from .. import wire
from .launch import LaunchedEngine

TAIL_LINES = 30
# Bytes on their way to an engine that does not read: more are refused.
MOST_BACKLOG = 64 << 20
# A start may be silent for so long whatever the limit: an interpreter and its modules come from a slow disk.
START_SECONDS = 30.0
_EXIT_SECONDS = 5.0
_LAST_WORDS_SECONDS = 1.0


@dataclass(frozen=True)
class Death:
    """How an engine process ended. `user_error`: the message says it all, and the next one would end so too."""

    message: str
    user_error: bool = False


class EngineLife:
    """`run` it once; meanwhile `send` to it.

    Args:
      expects: whether the engine should be saying something now: it is killed when it does not for `hang_seconds`.
      on_message, on_log: called with all that it sends and prints.
    """

    def __init__(
        self,
        launched: LaunchedEngine,
        settings: wire.EngineSettings,
        *,
        hang_seconds: float,
        expects: Callable[[], bool],
        on_message: Callable[[wire.FromEngine], None],
        on_log: Callable[[str], None] | None,
    ) -> None:
        self._launched = launched
        self._settings = settings
        self._hang_seconds = hang_seconds
        self._expects = expects
        self._on_message = on_message
        self._on_log = on_log
        self._tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._writer: asyncio.StreamWriter | None = None
        self._failed: wire.Failed | None = None
        self._reason = ""
        self._heard = True
        self._ready = False
        self._leaving = False

    @property
    def pid(self) -> int:
        return self._launched.process.pid

    @property
    def backlog(self) -> int:
        """Bytes that the engine has not read yet."""
        return 0 if self._writer is None else self._writer.transport.get_write_buffer_size()

    def send(self, message: wire.ToEngine) -> None:
        """To an engine that is ready. One that is dying reads nothing more: its death comes to light soon."""
        assert self._writer is not None
        if not self._writer.is_closing():
            self._writer.write(wire.frame(message))

    def leave(self) -> None:
        """Ask it to go; `run` returns within seconds. Before it is ready it could not answer, and holds nothing."""
        self._leaving = True
        if self._ready:
            self.send(wire.Shutdown())
        else:
            self.kill()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._launched.process.kill()

    async def run(self) -> Death:
        """Returns once the process has ended, and all that it said has been handled."""
        exited = asyncio.create_task(asyncio.to_thread(self._launched.process.wait))
        logs = asyncio.create_task(self._read_logs())
        talk = asyncio.create_task(self._talk())
        watch = asyncio.create_task(self._watch())
        tasks = [exited, logs, talk, watch]
        try:
            await asyncio.wait([exited, talk, watch], return_when=asyncio.FIRST_COMPLETED)
            if talk.done() and not exited.done() and not self._reason:
                await asyncio.wait([exited], timeout=_EXIT_SECONDS)  # it closed its end: it is about to leave
            self.kill()
            code = await exited
            # What lies in the socket and the pipe; a grandchild may hold the pipe open.
            rest = [logs] if self._writer is None else [logs, talk]
            await asyncio.wait(rest, timeout=_LAST_WORDS_SECONDS)
        finally:
            self.kill()
            for task in tasks[1:]:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            if self._writer is not None:
                self._writer.close()
            self._launched.close()
        if talk.done() and not talk.cancelled():
            talk.result()  # a bug of ours is not the engine's death
        return self._death(code)

    def _death(self, code: int) -> Death:
        if self._failed is not None and self._failed.user_error:
            return Death(self._failed.message, user_error=True)
        message = f"the engine process {self._reason or _how_it_ended(code)}"
        if self._failed is not None:
            message += f": {self._failed.message}"
        if self._tail:
            message += "\nIts last lines:\n" + "\n".join(f"  {line}" for line in self._tail)
        return Death(message)

    async def _talk(self) -> None:
        """Until the process closes its end, or says what it may not."""
        connected: asyncio.Future[asyncio.StreamReader] = asyncio.get_running_loop().create_future()

        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            if connected.done():
                writer.close()
                return
            self._writer = writer
            connected.set_result(reader)

        server = await asyncio.start_unix_server(accept, sock=self._launched.listener)
        try:
            reader = await connected
        finally:
            server.close()
        self.send(wire.Start(self._settings))
        try:
            while (message := await wire.receive(reader)) is not None:
                self._heard = True
                if isinstance(message, wire.Failed):
                    self._failed = message
                self._ready = self._ready or isinstance(message, wire.Ready)
                self._on_message(message)
        except wire.WireError as error:
            self._reason = f"said what it may not ({error}) and was killed"

    async def _watch(self) -> None:
        """Until it has been silent for too long."""
        tick = min(1.0, self._hang_seconds / 4)
        silent, before = 0.0, time.monotonic()
        while silent < (limit := self._hang_seconds if self._ready else max(self._hang_seconds, START_SECONDS)):
            await asyncio.sleep(tick)
            now = time.monotonic()
            # Time in which this process did not run either (a laptop that slept) is not held against the other one.
            passed, before = min(now - before, 2 * tick), now
            expected = (not self._ready or self._expects()) and not self._leaving
            silent = 0.0 if self._heard or not expected else silent + passed
            self._heard = False
        self._reason = f"hung (nothing from it for {limit:g} s) and was killed"

    async def _read_logs(self) -> None:
        reader, rest = asyncio.StreamReader(), b""
        loop = asyncio.get_running_loop()
        protocol = asyncio.StreamReaderProtocol(reader)
        transport, _ = await loop.connect_read_pipe(lambda: protocol, self._launched.take_output())
        try:
            while chunk := await reader.read(1 << 16):
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    self._log(line)
        finally:
            transport.close()
        if rest:
            self._log(rest)

    def _log(self, line: bytes) -> None:
        text = line.decode("utf-8", "replace").rstrip()
        self._tail.append(text[:2000])
        if self._on_log is not None:
            self._on_log(text)


def _how_it_ended(code: int) -> str:
    if code >= 0:
        return f"exited with status {code}"
    with contextlib.suppress(ValueError):
        name = signal.Signals(-code).name
        return f"was killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    return f"was killed by signal {-code}"

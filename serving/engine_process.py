"""The engine process: `python -m twinax.serving.engine_process --socket PATH`, started by the HTTP process.

The main thread steps the engine; a reader thread collects messages from the socket into an inbox that is emptied
between steps. With nothing to do the main thread sleeps on a condition. The process leaves when it is told to, or when
the other end of the socket closes, so it never outlives its parent.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import hashlib
import os
import signal
import sys
import threading
import time
import traceback
from typing import TYPE_CHECKING

from . import wire
from .request import InvalidRequest, QueueFull

if TYPE_CHECKING:
    from .engine import Engine

_LEAVE_SECONDS = 10.0


class Inbox:
    """Messages from the reader thread to the main thread. `closed` is set once nothing more will come."""

    def __init__(self) -> None:
        self._messages: list[wire.ToEngine] = []
        self._condition = threading.Condition()
        self.closed = False

    def put(self, message: wire.ToEngine) -> None:
        with self._condition:
            self._messages.append(message)
            self._condition.notify()

    def close(self) -> None:
        with self._condition:
            self.closed = True
            self._condition.notify()

    def take(self, *, wait: bool) -> list[wire.ToEngine]:
        """All messages that have come. With `wait`, sleeps until there is one or the inbox is closed."""
        with self._condition:
            while wait and not self._messages and not self.closed:
                self._condition.wait()
            messages, self._messages = self._messages, []
            return messages


class EngineServer:
    """Applies messages to an engine and sends back what its steps produce."""

    def __init__(self, engine: Engine, channel: wire.BlockingChannel, inbox: Inbox) -> None:
        self._engine = engine
        self._channel = channel
        self._inbox = inbox
        self._leaving = False

    def run(self) -> None:
        """Until told to leave or left alone by the parent."""
        while True:
            for message in self._inbox.take(wait=not self._engine.has_work):
                self._apply(message)
            if self._leaving or self._inbox.closed:
                return
            outputs = self._engine.step() if self._engine.has_work else []
            self._channel.send(wire.Step(outputs, stats_of(self._engine)))

    def _apply(self, message: wire.ToEngine) -> None:
        match message:
            case wire.Add():
                self._channel.send(self._add(message))
            case wire.Cancel():
                for request_id in message.ids:
                    self._engine.cancel(request_id)
            case wire.Shutdown():
                self._leaving = True
            case wire.Start():
                raise wire.WireError("the engine is started already")

    def _add(self, message: wire.Add) -> wire.Admitted | wire.Rejected:
        done = []
        try:
            for request in message.requests:
                self._engine.add(request)
                done.append(request.id)
        except (QueueFull, ValueError) as error:
            for request_id in done:
                self._engine.cancel(request_id)
            param = error.param if isinstance(error, InvalidRequest) else None
            return wire.Rejected(message.group, str(error), param, isinstance(error, QueueFull))
        return wire.Admitted(message.group)


def stats_of(engine: Engine) -> wire.Stats:
    stats = engine.stats()
    return wire.Stats(**{name: getattr(stats, name) for name in wire.Stats.__struct_fields__})


def build(settings: wire.EngineSettings, channel: wire.BlockingChannel) -> tuple[Engine, wire.Ready]:
    """Load the model and compile every step shape, reporting progress."""
    begin = time.perf_counter()
    channel.send(wire.Progress("importing JAX"))
    import jax

    from .engine import Engine, EngineConfig

    channel.send(wire.Progress("loading the model"))
    names = [name for name in wire.EngineSettings.__struct_fields__ if name != "model"]
    given = {name: getattr(settings, name) for name in names if getattr(settings, name) is not None}
    engine = Engine.from_path(settings.model, EngineConfig(**given))
    loaded = engine.loaded
    middle = time.perf_counter()

    def progress(done: int, total: int) -> None:
        channel.send(wire.Progress("compiling", done, total))

    engine.warmup(progress)
    end = time.perf_counter()
    config, stats = engine.config, engine.stats()
    # What decides the numbers, beside the weights themselves.
    identity = f"{loaded.config} {engine.tokenizer.fingerprint} {settings.dtype} {jax.__version__} "
    identity += jax.default_backend() + (f" {settings.plan}" if settings.plan else "")
    ready = wire.Ready(
        model=settings.model,
        family=loaded.family,
        tokenizer_files=engine.tokenizer.files(),
        vocab_size=loaded.config.vocab_size,
        max_model_len=engine.max_model_len,
        max_running=config.max_running,
        max_waiting=config.max_waiting,
        cache_tokens=stats.pages_total * config.page_size,
        fingerprint="fp_" + hashlib.sha256(identity.encode()).hexdigest()[:16],
        load_seconds=middle - begin,
        warmup_seconds=end - middle,
    )
    return engine, ready


class Reader(threading.Thread):
    """Moves messages from the socket to the inbox; at the end of the stream makes sure that the process ends."""

    def __init__(self, channel: wire.BlockingChannel, inbox: Inbox) -> None:
        super().__init__(name="reader", daemon=True)
        self._channel = channel
        self._inbox = inbox
        self.serving = threading.Event()

    def run(self) -> None:
        try:
            while (message := self._channel.receive()) is not None:
                self._inbox.put(message)
        except OSError as error:
            print(f"lost the HTTP process: {error}", file=sys.stderr, flush=True)
        self._inbox.close()
        # The parent is gone. The main thread sees it after its step; loading and compiling can't be interrupted.
        if self.serving.is_set():
            time.sleep(_LEAVE_SECONDS)
        os._exit(1)


def run(path: str) -> int:
    """Serve the HTTP process that listens on `path`. Returns the exit status."""
    channel, inbox = wire.BlockingChannel.connect(path), Inbox()
    start = channel.receive()
    if not isinstance(start, wire.Start):
        raise wire.WireError(f"expected the start message, got {type(start).__name__}")
    reader = Reader(channel, inbox)
    reader.start()
    try:
        engine, ready = build(start.settings, channel)
    except (ValueError, OSError) as error:
        # These messages are written for the user; the traceback would only hide them.
        channel.send(wire.Failed(str(error), user_error=True))
        return 1
    except Exception as error:
        traceback.print_exc()
        channel.send(wire.Failed(f"{type(error).__name__}: {error}"))
        return 1
    reader.serving.set()
    channel.send(wire.Step([], stats_of(engine)))
    channel.send(ready)
    # What lives now lives for good: keep the collector from walking it again and again.
    gc.collect()
    gc.freeze()
    try:
        EngineServer(engine, channel, inbox).run()
    except ConnectionError:
        return 1  # the parent is gone; nobody is left to tell
    except Exception as error:
        traceback.print_exc()
        sys.stderr.flush()
        channel.send(wire.Failed(f"{type(error).__name__}: {error}"))
        return 1
    return 0


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m twinax.serving.engine_process", description=__doc__)
    parser.add_argument("--socket", required=True, help="Unix socket on which the HTTP process listens")
    arguments = parser.parse_args()
    # Ctrl-C and service managers signal the whole group; the HTTP process decides when this one leaves.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    faulthandler.enable()
    status = run(arguments.socket)
    sys.stderr.flush()
    # Not sys.exit: the reader thread may sit in a read, and the device runtime takes its time to unwind.
    os._exit(status)


if __name__ == "__main__":
    main()

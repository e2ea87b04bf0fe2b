"""The engine process: `python -m twinax.serving.engine_process --socket PATH`, started by the HTTP process.

The main thread steps the engine; a reader thread collects messages from the socket into an inbox that is emptied
between steps. With nothing to do the main thread sleeps on a condition. What takes long (loading other weights, a
profile) runs in a thread beside the steps. The process leaves when it is told to, or when the other end of the socket
closes, so it never outlives its parent.
"""

from __future__ import annotations

import argparse
import dataclasses
import faulthandler
import gc
import hashlib
import importlib
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING

from . import wire
from .grammar import THREAD_STACK
from .request import Grammar, InvalidRequest, QueueFull

if TYPE_CHECKING:
    from ..checkpoints.load import LoadedModel
    from .engine import Engine

_LEAVE_SECONDS = 10.0
_PULSE_SECONDS = 1.0


@dataclass(frozen=True)
class Loaded:
    """What came of loading other weights, in its thread: a model, or why not."""

    model: LoadedModel | None
    error: str | None = None


@dataclass(frozen=True)
class Compiled:
    """The grammars of the requests of an Add are compiled, in a thread; or why not."""

    group: int
    error: str | None = None


Local = Loaded | Compiled


class Inbox:
    """Messages from other threads to the main thread. `closed` is set once nothing more will come."""

    def __init__(self) -> None:
        self._messages: list[wire.ToEngine | Local] = []
        self._condition = threading.Condition()
        self.closed = False

    def put(self, message: wire.ToEngine | Local) -> None:
        with self._condition:
            self._messages.append(message)
            self._condition.notify()

    def close(self) -> None:
        with self._condition:
            self.closed = True
            self._condition.notify()

    def take(self, *, wait: bool) -> list[wire.ToEngine | Local]:
        """All messages that have come. With `wait`, sleeps until there is one or the inbox is closed."""
        with self._condition:
            while wait and not self._messages and not self.closed:
                self._condition.wait()
            messages, self._messages = self._messages, []
            return messages


class EngineServer:
    """Applies messages to an engine and sends back what its steps produce.

    Other weights: requests that came before they were loaded finish on the old ones, later ones wait for the new ones.
    """

    def __init__(self, engine: Engine, channel: wire.BlockingChannel, inbox: Inbox) -> None:
        self._engine = engine
        self._channel = channel
        self._inbox = inbox
        self._leaving = False
        self._held = False
        self._reload: wire.Reload | None = None
        self._next: LoadedModel | None = None
        self._later: list[wire.Add | wire.Cancel] = []
        self._compiling: dict[int, wire.Add] = {}  # by group, until their grammars are compiled

    def run(self) -> None:
        """Until told to leave or left alone by the parent."""
        engine = self._engine
        while True:
            if self._next is not None and not engine.has_work:
                self._exchange(self._next)
            for message in self._inbox.take(wait=self._held or not engine.has_work):
                self._apply(message)
            if self._leaving or self._inbox.closed:
                return
            outputs = engine.step() if engine.has_work and not self._held else []
            self._channel.send(wire.Step(outputs, stats_of(engine)))

    def _apply(self, message: wire.ToEngine | Local) -> None:
        match message:
            case wire.Add() if self._next is not None:
                self._later.append(message)
            case wire.Add() if new := self._new_grammars(message):
                self._compiling[message.group] = message
                self._beside(lambda: self._inbox.put(self._compile(message.group, new)))
            case wire.Add():
                self._channel.send(self._add(message))
            case Compiled():
                self._go_on(message)
            case wire.Cancel():
                for request_id in message.ids:
                    (self._engine.finish if message.complete else self._engine.cancel)(request_id)
                gone = set(message.ids)
                for group, add in list(self._compiling.items()):
                    if any(request.id in gone for request in add.requests):
                        del self._compiling[group]
                if self._next is not None:
                    self._later.append(message)
            case wire.Hold():
                self._held = message.held
            case wire.Reload():
                self._start_reload(message)
            case Loaded():
                self._next = message.model
                if message.error is not None:
                    self._reloaded(message.error)
            case wire.Profile():
                self._beside(lambda: self._profile(message))
            case wire.Shutdown():
                self._leaving = True
            case wire.Start():
                raise wire.WireError("the engine is started already")

    def _beside(self, work: Callable[[], None]) -> None:
        threading.Thread(target=work, daemon=True).start()

    def _new_grammars(self, message: wire.Add) -> list[Grammar]:
        grammars = dict.fromkeys(request.params.grammar for request in message.requests)
        return [one for one in grammars if one is not None and one not in self._engine.grammars]

    def _compile(self, group: int, grammars: list[Grammar]) -> Compiled:
        try:
            for grammar in grammars:
                self._engine.grammars.compile(grammar)
        except ValueError as error:
            return Compiled(group, str(error))
        except BaseException as error:  # the library's panics are no Exceptions
            traceback.print_exc()
            return Compiled(group, f"the compiler fails on it ({type(error).__name__})")
        return Compiled(group)

    def _go_on(self, message: Compiled) -> None:
        add = self._compiling.pop(message.group, None)
        if add is None:
            return  # cancelled
        if message.error is None:
            self._apply(add)
        else:
            self._channel.send(wire.Rejected(add.group, f"The grammar can't be used: {message.error}.", "grammar"))

    def _start_reload(self, message: wire.Reload) -> None:
        if self._reload is not None:
            self._channel.send(wire.Done(message.call, error=f"{self._reload.path} is being loaded; wait for it."))
            return
        self._reload = message
        self._beside(lambda: self._inbox.put(self._load(message.path)))

    def _load(self, path: str) -> Loaded:
        from .reload import load_like

        try:
            return Loaded(load_like(self._engine, path))
        except (ValueError, OSError) as error:
            return Loaded(None, str(error))
        except Exception as error:  # no memory for both, perhaps: the old weights serve on
            traceback.print_exc()
            return Loaded(None, f"{type(error).__name__}: {error}")

    def _exchange(self, model: LoadedModel) -> None:
        from .reload import exchange

        exchange(self._engine, model)
        self._next = None
        self._reloaded(None)
        later, self._later = self._later, []
        for message in later:
            self._apply(message)

    def _reloaded(self, error: str | None) -> None:
        assert self._reload is not None
        text = "" if error else f"{self._engine.loaded.source} is served from now on"
        self._channel.send(wire.Done(self._reload.call, text, error))
        self._reload = None

    def _profile(self, message: wire.Profile) -> None:
        import jax

        try:
            with jax.profiler.trace(message.folder):
                time.sleep(message.seconds)
        except Exception as error:  # a folder that can't be written, a second profile: nothing that steps mind
            self._channel.send(wire.Done(message.call, error=f"{type(error).__name__}: {error}"))
        else:
            self._channel.send(wire.Done(message.call, f"a profile of {message.seconds:g} s is in {message.folder}"))

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


class Pulse:
    """Says where the start is, and says it again every second: one that is silent is taken for dead."""

    def __init__(self, channel: wire.BlockingChannel) -> None:
        self._channel = channel
        self._latest = wire.Progress("starting")
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._repeat, name="pulse", daemon=True)

    def __enter__(self) -> Pulse:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    def say(self, stage: str, done: int = 0, total: int = 0) -> None:
        self._latest = wire.Progress(stage, done, total)
        self._channel.send(self._latest)

    def _repeat(self) -> None:
        while not self._over.wait(_PULSE_SECONDS):
            try:
                self._channel.send(self._latest)
            except OSError:
                return  # the parent is gone: the reader sees to it


def build(settings: wire.EngineSettings, pulse: Pulse, begin: float) -> tuple[Engine, wire.Ready]:
    """Load the model and compile every step shape, reporting progress. `begin`: when the start began."""
    import jax

    from .engine import Engine, EngineConfig

    pulse.say("loading the model")
    names = [name for name in wire.EngineSettings.__struct_fields__ if name != "model"]
    given = {name: getattr(settings, name) for name in names if getattr(settings, name) is not None}
    config = EngineConfig(**given)
    # The HTTP process holds the queue to `max_waiting` beside those that run. All of them may come here at once, to an
    # engine that was just started and runs none yet.
    engine = Engine.from_path(
        settings.model, dataclasses.replace(config, max_waiting=config.max_waiting + config.max_running)
    )
    loaded = engine.loaded
    middle = time.perf_counter()

    engine.warmup(lambda done, total: pulse.say("compiling", done, total))
    end = time.perf_counter()
    stats = engine.stats()
    # What decides the numbers, beside the weights themselves.
    identity = f"{loaded.config} {engine.tokenizer.fingerprint} {settings.dtype} {settings.cache_dtype} "
    identity += f"{jax.__version__} {jax.default_backend()}" + (f" {settings.plan}" if settings.plan else "")
    ready = wire.Ready(
        model=settings.model,
        family=loaded.family,
        tokenizer_files=engine.tokenizer.files(),
        vocab_size=loaded.config.vocab_size,
        hidden_size=loaded.config.hidden_size,
        max_model_len=engine.max_model_len,
        max_running=config.max_running,
        max_waiting=config.max_waiting,
        cache_tokens=stats.pages_total * config.page_size,
        fingerprint="fp_" + hashlib.sha256(identity.encode()).hexdigest()[:16],
        load_seconds=middle - begin,
        warmup_seconds=end - middle,
        honours=engine.scheduler.waiting.honours,
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
    begin = time.perf_counter()
    channel, inbox = wire.BlockingChannel.connect(path), Inbox()
    threading.stack_size(THREAD_STACK)
    reader = Reader(channel, inbox)
    try:
        with Pulse(channel) as pulse:
            pulse.say("importing JAX")
            # The parent imports for as long, before it says what to start.
            importlib.import_module(".engine", __package__)

            start = channel.receive()
            if start is None:
                return 1  # the parent is gone; nobody is left to tell
            if not isinstance(start, wire.Start):
                raise wire.WireError(f"expected the start message, got {type(start).__name__}")
            reader.start()
            engine, ready = build(start.settings, pulse, begin)
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
    gc.enable()
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
    gc.disable()  # until it is ready: all that importing and tracing make stays, and looking at it takes a tenth longer
    status = run(arguments.socket)
    sys.stderr.flush()
    # Not sys.exit: the reader thread may sit in a read, and the device runtime takes its time to unwind.
    os._exit(status)


if __name__ == "__main__":
    main()

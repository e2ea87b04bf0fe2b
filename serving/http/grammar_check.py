"""Tries grammars out before the engine sees them, in the process of `serving/grammar_child.py`."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import msgspec

from ..request import Grammar
from .errors import ApiError, bad, queue_full

if TYPE_CHECKING:
    from .. import wire

MOST_WAITING = 32
# By the clock, of one grammar; its own limit is of processor time. A process that is silent for longer is ended.
PATIENCE_SECONDS = 60.0
_KEPT_VERDICTS = 1024
_KEPT_CHARACTERS = 16 << 20


class GrammarCheck:
    """One process, started with the first grammar. What it said of a grammar is kept.

    Invariants: grammars are tried out one after another, each for a bounded time; the event loop never waits.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammars")
        self._process: subprocess.Popen[bytes] | None = None
        self._verdicts: OrderedDict[Grammar, str] = OrderedDict()
        self._characters = 0
        self._waiting = 0
        atexit.register(self.close)

    async def check(self, grammar: Grammar, param: str, ready: wire.Ready) -> None:
        """Raises ApiError: 400 that says what is wrong with the grammar of the field `param`, 429 when many wait."""
        error = self._verdicts.get(grammar)
        if error is None:
            if self._waiting >= MOST_WAITING:
                raise queue_full(1, f"{self._waiting} grammars wait to be compiled. Try again in 1 s.")
            self._waiting += 1
            try:
                error = await asyncio.get_running_loop().run_in_executor(self._thread, self._ask, grammar, ready)
            finally:
                self._waiting -= 1
            self._keep(grammar, error)
        if error:
            raise bad(param, f"'{param}' can't be used: {error}.", "invalid_grammar")

    def close(self) -> None:
        """Ends the process."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._end()

    def _keep(self, grammar: Grammar, error: str) -> None:
        if grammar not in self._verdicts:
            self._verdicts[grammar] = error
            self._characters += len(grammar.text)
        while len(self._verdicts) > _KEPT_VERDICTS or self._characters > _KEPT_CHARACTERS:
            self._characters -= len(self._verdicts.popitem(last=False)[0].text)

    # -- in the thread ------------------------------------------------------------------------------------------------

    def _ask(self, grammar: Grammar, ready: wire.Ready) -> str:
        from .. import grammar_child

        for _ in range(2):
            process = self._process or self._start(ready)
            assert process.stdin is not None
            assert process.stdout is not None
            timer = threading.Timer(PATIENCE_SECONDS, _kill, [process])
            timer.start()
            with contextlib.suppress(BrokenPipeError):
                grammar_child.send(process.stdin, grammar)
            data = grammar_child.receive(process.stdout)
            timer.cancel()
            if data is not None:
                return msgspec.msgpack.decode(data, type=str)
            self._end()
        raise ApiError(503, "The process that compiles grammars has ended twice.", code="grammar_process_died")

    def _start(self, ready: wire.Ready) -> subprocess.Popen[bytes]:
        from .. import grammar_child

        environment = {name: value for name, value in os.environ.items() if name != "TWINAX_API_KEY"}
        command = [sys.executable, "-P", "-m", "twinax.serving.grammar_child"]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, start_new_session=True
        )
        self._process = process
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            grammar_child.send(process.stdin, grammar_child.Vocabulary(ready.tokenizer_files, ready.vocab_size))
        return process

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        _kill(process)
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
        process.wait()


def _kill(process: subprocess.Popen[bytes]) -> None:
    """With the fork in which it may be trying a grammar, which has the pipes too."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)

"""Notices when a process of a job is gone, says so, and ends this one, so that nobody waits for ever in a collective.

- Each process writes a beat to JAX's coordination service, which process 0 holds. Process 0 reads all beats; when one
  stops, it tells the others through the same service, and each says it and ends.
- A process that fails by itself tells the others why in the same way.
- When process 0 is gone, so is the service, and JAX aborts the rest at once. Its words are many and name no process;
  `last_words` adds ours. A machine that fell silent without closing its connections is noticed by the clock.
- A judge that was itself stopped for a while (SIGSTOP, a moved virtual machine) starts its clocks again.
"""

import ctypes
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

BEATS, ENDS = "twinax/beat/", "twinax/end/"
SETTLE = 3.0  # beats that the end of another leaves this process to come to its own, and to say why
LINGER = 6.0  # beats that process 0 stays after the last word, so that all hear it and speak theirs
STATUS = 1


class Watch:
    """The watch of process `process` of `processes`.

    Args:
        client: the client of JAX's coordination service.
        process, processes: which this is, of how many.
        coordinator: where process 0 is, for the message.
        grace: seconds without a beat after which a process is taken for gone.
        interval: seconds between beats.

    Attributes:
        advice: what to do about it, as a function of nothing; it is called when the job ends early.
        leaving: set when this process is on its way out by itself and has said why.
    """

    def __init__(
        self, client: Any, process: int, processes: int, coordinator: str, *, grace: float = 30.0, interval: float = 1.0
    ):
        self._client, self._process, self._processes, self._coordinator = client, process, processes, coordinator
        self.grace, self._interval = grace, interval
        self.advice: Callable[[], str] | None = None
        self.leaving = threading.Event()
        self._stop = threading.Event()
        self._heard: dict[str, str] = {}  # the newest beat of each process, and of the service itself
        self._ends: dict[str, str] = {}
        self._threads = [threading.Thread(target=f, daemon=True) for f in (self._talk, self._judge)]

    def start(self) -> None:
        last_words(self._abort_text)
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Ends the watch; what happens from here on is not its business."""
        self._stop.set()
        for thread in self._threads:
            thread.join()
        last_words(None)

    def announce(self, text: str) -> None:
        """Tells the other processes why this one ends."""
        self._client.key_value_set(f"{ENDS}{self._process}", text, allow_overwrite=True)

    def announced_by(self, process: int) -> str | None:
        """What a process said of its end, as far as it was heard."""
        return self._ends.get(str(process))

    def _talk(self) -> None:
        """Everything that can block on the network; the judge must not."""
        who = f"pid {os.getpid()} on {socket.gethostname()}"
        count = 0
        while not self._stop.wait(self._interval):
            count += 1
            try:
                self._client.key_value_set(f"{BEATS}{self._process}", f"{count} {who}", allow_overwrite=True)
                if self._process == 0:
                    self._heard.update(self._read(BEATS))
                self._ends.update(self._read(ENDS))
            except RuntimeError:  # the service is gone, or shutting down; the clock decides what that means
                continue
            self._heard["service"] = str(count)

    def _read(self, folder: str) -> dict[str, str]:
        return {key.rpartition("/")[2]: value for key, value in self._client.key_value_dir_get(folder)}

    def _judge(self) -> None:
        watched = ["service"] if self._process else [str(other) for other in range(1, self._processes)]
        now = time.monotonic()
        seen = {name: ("", now) for name in watched}
        while not self._stop.wait(self._interval):
            last, now = now, time.monotonic()
            if now - last > 5 * self._interval:
                seen = {name: (beat, now) for name, (beat, _) in seen.items()}
            for name in watched:
                if self._heard.get(name, "") != seen[name][0]:
                    seen[name] = self._heard[name], now
            silent = [name for name in watched if now - seen[name][1] > self.grace]
            failed = {name: text for name, text in self._ends.items() if name != str(self._process)}
            if failed:
                if not self._leaves_by_itself():
                    self._end(next(iter(failed.values())))
            elif silent and not self.leaving.is_set():
                self._end(self._lost(silent, seen))

    def _leaves_by_itself(self) -> bool:
        """What befell one process may befall them all: whether this one comes to an end with a word of its own."""
        return self.leaving.wait(SETTLE * self._interval) or self._stop.is_set()

    def _lost(self, silent: list[str], seen: dict[str, tuple[str, float]]) -> str:
        if silent == ["service"]:
            return (
                f"process 0 at {self._coordinator}, which keeps the {self._processes} processes together, has not "
                f"answered for {self.grace:.0f} seconds: killed, or the machine or the network is gone"
            )
        names = [f"{name} ({seen[name][0].partition(' ')[2] or 'which never spoke'})" for name in silent]
        are = f"process {names[0]} has" if len(names) == 1 else f"processes {', '.join(names)} have"
        return (
            f"{are} not been heard of for {self.grace:.0f} seconds, out of {self._processes} processes: killed, or the "
            "machine or the network is gone"
        )

    def _abort_text(self) -> str:
        return (
            f"JAX has ended process {self._process}; its reason is above. A closed socket or a failed RPC there means "
            f"that process 0 at {self._coordinator}, which keeps the {self._processes} processes together, is gone: "
            f"killed, or its machine or the network is lost.\n{self.told_to_do()}"
        )

    def _end(self, reason: str) -> None:
        self._say(reason)
        if self._process == 0:
            self.announce(reason)
            time.sleep(LINGER * self._interval)
        os._exit(STATUS)

    def _say(self, reason: str) -> None:
        say(f"{reason}.\nEvery process of the job stops. {self.told_to_do()}")

    def told_to_do(self) -> str:
        """What to do now."""
        advice = "" if self.advice is None else self.advice()
        return advice or "Start all of them again, with the same command."


def say(text: str) -> None:
    """One message to the standard error, past whatever buffers it."""
    sys.stderr.flush()
    os.write(2, f"twinax: {text}\n".encode())


_HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_int)
_installed: list[Any] = []  # the handler that C calls must stay alive


def last_words(text: Callable[[], str] | None) -> None:
    """Says `text()` when C++ code calls abort(), and then exits; None: no longer.

    Python's own handlers can't do it: they only set a flag, and abort() does not wait for anybody to look.
    """
    libc = ctypes.CDLL(None)
    libc.signal.restype = ctypes.c_void_p
    if text is None:
        libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
        libc.signal(signal.SIGABRT, None)  # the default action
        return

    def handler(number: int) -> None:
        try:
            say(text())
        finally:
            os._exit(STATUS)

    _installed.append(_HANDLER(handler))
    libc.signal.argtypes = [ctypes.c_int, _HANDLER]
    libc.signal(signal.SIGABRT, _installed[-1])

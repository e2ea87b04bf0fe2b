"""A server of ours on this machine, in a process of its own, for as long as it is measured."""

import contextlib
import dataclasses
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from typing import Any

_READY = re.compile(r"ready at (http://\S+?)(/v1)?( |$)")
_STOP_SECONDS = 60


class ServerFailed(OSError):
    """It ended before it was ready; the message is its own."""


@dataclasses.dataclass
class Process:
    """A running `twinax serve`. `url`: without a path; `lines`: what it printed."""

    process: subprocess.Popen[str]
    url: str
    lines: list[str]


@contextlib.contextmanager
def process(model: str, *flags: str) -> Iterator[Process]:
    """Starts `twinax serve MODEL FLAGS` on a free port, and stops it at the end. Raises ServerFailed."""
    # -P: the working folder must not shadow modules of the server.
    command = [sys.executable, "-P", "-m", "twinax", "serve", model, "--port", "0", *flags]
    environment = {name: value for name, value in os.environ.items() if name != "TWINAX_API_KEY"}
    started = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=environment,
    )
    found = Process(started, "", [])
    known = threading.Event()  # where it is, or that it is nowhere

    def read() -> None:
        assert started.stdout is not None
        for line in started.stdout:
            found.lines.append(line.rstrip("\n"))
            if not found.url and (ready := _READY.search(line)):
                found.url = ready[1]
                known.set()
        known.set()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        known.wait()
        if not found.url:
            status = started.wait()
            said = [line for line in found.lines if "error" in line] or found.lines
            raise ServerFailed(said[-1] if said else f"the server ended with status {status}")
        yield found
    finally:
        started.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            started.wait(_STOP_SECONDS)
        started.kill()
        started.wait()
        reader.join(10)


@contextlib.contextmanager
def local_server(model: str, settings: Mapping[str, Any]) -> Iterator[str]:
    """Starts `twinax serve MODEL` on a free port with these settings; gives its URL. Raises ServerFailed."""
    with process(model, *(f"--{name.replace('_', '-')}={value}" for name, value in settings.items())) as server:
        yield server.url

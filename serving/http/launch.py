"""Starts the engine process, before anything slow is imported here, so that the two processes get ready together."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from types import TracebackType
from typing import IO

_LONGEST_SOCKET_PATH = 100  # the kernel's limit is 108 bytes


class LaunchedEngine:
    """The process, the socket it will connect to, and the private folder that holds the socket.

    `close`, or leaving the context, kills the process if it still runs, and removes the folder.
    """

    def __init__(self, module: str = "twinax.serving.engine_process") -> None:
        self._module = module
        self._folder = _private_folder()
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self.process = self._start(os.path.join(self._folder, "engine"))
        except OSError:
            self._clean_up()
            raise

    def _start(self, path: str) -> subprocess.Popen[bytes]:
        self.listener.bind(path)
        self.listener.listen(1)
        environment = {name: value for name, value in os.environ.items() if name != "TWINAX_API_KEY"}
        # A virtual machine may have to ask its host for each huge page: weights took three times as long to read.
        environment.setdefault("NUMPY_MADVISE_HUGEPAGE", "0")
        return subprocess.Popen(
            # -P: the working folder must not shadow modules of the engine.
            [sys.executable, "-P", "-m", self._module, "--socket", path],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def __enter__(self) -> LaunchedEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def take_output(self) -> IO[bytes]:
        """What the process prints; whoever takes it closes it (two owners would close each other's descriptors)."""
        output, self.process.stdout = self.process.stdout, None
        assert output is not None
        return output

    def close(self) -> None:
        """Safe to call twice."""
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                self.process.kill()
            self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
        self._clean_up()

    def _clean_up(self) -> None:
        self.listener.close()
        shutil.rmtree(self._folder, ignore_errors=True)


def _private_folder() -> str:
    """A folder that only this user can enter, with a path short enough to hold a Unix socket."""
    folder = tempfile.mkdtemp(prefix="twinax-")
    if len(os.path.join(folder, "engine").encode()) > _LONGEST_SOCKET_PATH:
        os.rmdir(folder)
        folder = tempfile.mkdtemp(prefix="twinax-", dir="/tmp")
    return folder

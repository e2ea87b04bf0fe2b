"""A listening Unix socket that only this user can reach."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from collections.abc import Iterator


@contextlib.contextmanager
def listen_unix(path: str) -> Iterator[socket.socket]:
    """Listen on `path` (mode 0600), which is removed at the end. One that a dead server left behind is replaced.

    Raises OSError when something else is there, or somebody listens on it.
    """
    _remove_stale(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with listener:
        # From its first moment on: a chmod would come after it.
        mask = os.umask(0o177)
        try:
            listener.bind(path)
        except OSError as error:
            raise OSError(f"can't listen on {path}: {error.strerror or error}; choose another path") from None
        finally:
            os.umask(mask)
        try:
            listener.listen(16)
            listener.setblocking(False)
            yield listener
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)


def _remove_stale(path: str) -> None:
    try:
        mode = os.lstat(path).st_mode
    except OSError:
        return  # nothing there, or `bind` says what is wrong
    if not stat.S_ISSOCK(mode):
        raise OSError(f"{path} is there and is not a socket; choose another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
    raise OSError(f"another server listens on {path}; stop it, or choose another path")

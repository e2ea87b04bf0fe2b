"""`serve`: one model behind an OpenAI-style HTTP server, until a signal, or until its engine has died too often.

Imports little: `serve` starts the engine process first, and the rest of the server is imported while that one starts.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import sys
import time
from pathlib import Path
from typing import TextIO

from .config import ServeConfig
from .launch import LaunchedEngine
from .unix import listen_unix


class PortInUse(OSError):
    """Another program listens on the port."""


def serve(
    config: ServeConfig,
    engine: LaunchedEngine | None = None,
    *,
    out: TextIO | None = None,
    err: TextIO | None = None,
) -> None:
    """Serve until SIGTERM or Ctrl-C; then stop accepting, let requests finish for `drain_seconds`, and return.

    `engine`: one that was started earlier, which ends with the server; by default one is started here.
    Progress and warnings go to `err` (standard error), the ready line to `out` (standard output).

    Raises:
      PortInUse, OSError: the address can't be listened on (checked before the model is loaded).
      EngineError: the model can't be loaded, or the engine died too often (`max_restarts`).
    """
    if not Path(config.model).expanduser().exists():
        message = f"there is no model at {config.model}; give a checkpoint, a run folder or a Hugging Face folder"
        raise FileNotFoundError(message)
    begin = time.perf_counter()
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(contextlib.closing(listen(config.host, config.port, config.stall_seconds)))
        admin = None if config.admin_socket is None else stack.enter_context(listen_unix(config.admin_socket))
        launched = stack.enter_context(engine or LaunchedEngine())
        from .running import run

        run(config, listener, admin, launched, begin, out or sys.stdout, err or sys.stderr)


def listen(host: str, port: int, stall_seconds: float = 60.0) -> socket.socket:
    """A listening TCP socket. Raises PortInUse, or OSError for an address that is not of this machine.

    The kernel closes connections whose other end takes nothing for `stall_seconds`, or has vanished.
    """
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (socket.gaierror, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no name"
        raise OSError(f"can't listen on host {host!r}: {reason}; use 127.0.0.1, 0.0.0.0 or ::") from None
    sock = socket.socket(family, kind, proto)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # those that are accepted inherit it
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(stall_seconds * 1000))
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

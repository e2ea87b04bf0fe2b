"""Coming together: JAX's own way to fail at it is to abort, with a page of stack frames and no address."""

import errno
import os
import socket
import threading
import time

from .launch import Launch, ProcessError
from .watch import say


def check_coordinator(launch: Launch, timeout: float) -> None:
    """Raises ProcessError unless process 0 can listen at its address, and the others reach it in `timeout` seconds."""
    host, _, port = launch.coordinator.rpartition(":")
    if launch.process == 0:
        _check_port(launch, int(port))
    else:
        _reach(launch, host.strip("[]"), int(port), timeout)


def _check_port(launch: Launch, port: int) -> None:
    with socket.socket(socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            why = error.strerror or str(error)
            if error.errno == errno.EADDRINUSE:
                why = "another program listens there (or another process was started as --process 0)"
            raise ProcessError(
                f"Process 0 cannot listen at port {port} of --coordinator {launch.coordinator}: {why}. Choose another "
                "port, the same for all processes."
            ) from error


def _reach(launch: Launch, host: str, port: int, timeout: float) -> None:
    end = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection((host, port), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                raise ProcessError(_unreachable(launch, host, timeout, error)) from error
        time.sleep(0.3)


def _unreachable(launch: Launch, host: str, timeout: float, error: OSError) -> str:
    if isinstance(error, socket.gaierror):
        why = f"the name {host} cannot be resolved from {socket.gethostname()}"
    elif isinstance(error, ConnectionRefusedError):
        why = "the machine answers and nothing listens at that port"
    else:
        why = f"{error.strerror or 'no answer'}; a firewall may stand between"
    return (
        f"Process {launch.process} of {launch.processes} did not reach the coordinator at {launch.coordinator} "
        f"({launch.found_in}) in {timeout:.0f} seconds: {why}. Check that process 0 is started, that it runs on that "
        "machine, and that the port is open."
    )


def refused(launch: Launch | str) -> str:
    """The last words of a process that JAX aborts while it joins."""
    me = f"process {launch.process} of {launch.processes}" if isinstance(launch, Launch) else "this process"
    return (
        f"{me} could not join the others; the lines above have JAX's reason. Check that --processes is the same for "
        "all, and --process another number for each."
    )


class Deadline:
    """Within the `with` block: ends the process with a word when the others have not come by the time `end`."""

    def __init__(self, launch: Launch | str, timeout: float, end: float):
        self._launch, self._timeout, self._end, self._met = launch, timeout, end, threading.Event()

    def __enter__(self) -> None:
        threading.Thread(target=self._wait, daemon=True).start()

    def __exit__(self, *exception: object) -> None:
        self._met.set()

    def _wait(self) -> None:
        if self._met.wait(max(1.0, self._end - time.monotonic())):
            return
        launch, where = self._launch, "where JAX looked for them"
        if isinstance(launch, Launch):
            where = f"of the {launch.processes} at {launch.coordinator} ({launch.found_in}; this is {launch.process})"
        say(
            f"not all processes {where} came together in {self._timeout:.0f} seconds. Check that each was started, "
            "with the same --processes and --coordinator and a --process of its own, and what those that stopped said."
        )
        os._exit(1)

"""Several processes as one job: joining, agreeing, leaving together.

Every function here is called by all processes alike; with one process they do nothing, or return what it says itself.
They talk through JAX's coordination service, a small store of texts, and may be called from any thread; arrays go
between the devices (see `train`). A process that is gone ends the others (see `watch`), so nothing here waits for ever.
"""

import atexit
import collections
import errno
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import jax

from .launch import AUTO, Launch, ProcessError, find_launch
from .watch import LINGER, SETTLE, Watch, last_words, say

__all__ = ["AUTO", "Job", "Launch", "ProcessError", "agree", "count", "exchange", "first", "from_first", "index", "join"]

T = TypeVar("T")
_FOREVER_MS = 10**9  # eleven days; a process that is gone ends the wait long before
_uses: collections.Counter[str] = collections.Counter()
_job: "Job | None" = None


def join(
    coordinator: str | None = None,
    processes: str | int | None = None,
    process: int | None = None,
    *,
    timeout: float = 300,
    grace: float = 30,
) -> "Job":
    """Makes this process part of its job; before anything else is done with JAX. Use the result in a `with`.

    Args:
        coordinator, processes, process: see `Launch`; what is None is found in the environment (see `find_launch`).
        timeout: seconds until all processes must be there.
        grace: seconds without a sign of life after which a process is taken for gone.

    Raises ProcessError for numbers that do not fit and for a coordinator that cannot be reached; if others do not come,
    says so and ends the process.
    """
    launch = find_launch(coordinator, processes, process, os.environ)
    if launch is None:
        return Job(0, 1, None)
    # JAX's would take SIGTERM for itself, also while nobody looks at it.
    jax.config.update("jax_enable_preemption_service", False)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    begin = time.monotonic()
    if isinstance(launch, Launch):
        _meet(launch, timeout)
    last_words(lambda: _refused(launch))
    with _Deadline(launch, timeout, begin):
        _initialize(launch, round(timeout) + 60)
    state = _state()
    where = str(state.coordinator_address)
    job = Job(state.process_id, state.num_processes, Watch(state.client, state.process_id, state.num_processes, where))
    assert job.watch is not None
    job.watch.grace = grace
    return job


class Job:
    """This process among its fellows. Within the `with` block it is watched over; leaving it, all leave together.

    An exception in the block is told to the others, which then end too.
    """

    def __init__(self, process: int, processes: int, watch: Watch | None):
        self.process, self.processes, self.watch = process, processes, watch

    @property
    def is_first(self) -> bool:
        """Whether this is the process that speaks to the user."""
        return self.process == 0

    def __enter__(self) -> "Job":
        global _job
        if self.watch is not None:
            self.watch.start()
            _job = self
            agree("--processes", str(self.processes))
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        global _job
        if self.watch is None:
            return
        if error is None:
            exchange("leave", "")
            self.watch.stop()
            _job = None
            jax.distributed.shutdown()
        else:
            self._fail(self.watch, error)

    def _fail(self, watch: Watch, error: BaseException) -> None:
        if isinstance(error, jax.errors.JaxRuntimeError):
            # Most likely the other end of a collective is gone: the watch, which knows who, has the word.
            watch.grace = min(watch.grace, 10.0)
            say(f"process {self.process}: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
            time.sleep(watch.grace + SETTLE)
        text = f"{type(error).__name__}: {error}"
        watch.leaving.set()
        watch.announce(f"process {self.process} of {self.processes} has stopped: {text}")
        # The others can't follow a shutdown in step any more, and JAX would wait for them when Python ends.
        atexit.register(_exit_now, 130 if isinstance(error, KeyboardInterrupt) else 1, self.is_first)
        if not self.is_first:
            time.sleep(LINGER)
            if (watch.announced_by(0) or "").endswith(f"has stopped: {text}"):
                _exit_now(1, False)  # it befell them all alike, and one has said it


def _exit_now(status: int, is_first: bool) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    if is_first:
        time.sleep(LINGER + SETTLE)  # the service that tells the others lives here
    os._exit(status)


def count() -> int:
    """How many processes there are."""
    return _state().num_processes


def index() -> int:
    """Which of them this is, from 0."""
    return _state().process_id


def advise(advice: Callable[[], str]) -> None:
    """What to tell the user to do should the job end early."""
    if _job is not None and _job.watch is not None:
        _job.watch.advice = advice


def exchange(name: str, text: str) -> list[str]:
    """The text of every process, in their order. All call it with the same names in the same order of each name."""
    if count() == 1:
        return [text]
    client, folder = _state().client, _key(name)
    client.key_value_set(f"{folder}/{index()}", f"={text}")
    client.wait_at_barrier(folder, _FOREVER_MS)
    found = {int(key.rpartition("/")[2]): value[1:] for key, value in client.key_value_dir_get(f"{folder}/")}
    return [found[process] for process in sorted(found)]


def from_first(name: str, make: Callable[[], str]) -> str:
    """What `make` gives in process 0, which alone calls it."""
    if count() == 1:
        return make()
    client, key = _state().client, _key(name)
    if index() == 0:
        text = make()
        client.key_value_set(key, f"={text}")
        return text
    return client.blocking_key_value_get(key, _FOREVER_MS)[1:]


def first(name: str, make: Callable[[], T]) -> T:
    """What `make` gives, called in process 0 first and then in the others: they find what it left on a shared disk."""
    if index() == 0:
        made = make()
        from_first(name, str)
        return made
    from_first(name, str)
    return make()


def agree(name: str, text: str) -> None:
    """Raises ProcessError unless all processes say the same; `name` is what they should agree on, in words."""
    texts = exchange(f"agree/{name}", text)
    others = [process for process, said in enumerate(texts) if said != texts[0]]
    if others:
        shown = f"{texts[0]!r} in process 0 and {texts[others[0]]!r} in process {others[0]}"
        more = f" ({len(others)} processes differ)" if len(others) > 1 else ""
        raise ProcessError(
            f"All processes of a job must agree on {name}, which is {shown}{more}. Start all of them with the same "
            "command, the same files and the same version of Twinax."
        )


def _state() -> Any:
    """What JAX knows of the job, without making its devices, which `jax.process_count()` would."""
    from jax._src import distributed  # there is no public way

    return distributed.global_state


_counting = threading.Lock()


def _key(name: str) -> str:
    with _counting:
        _uses[name] += 1
        return f"twinax/say/{name}/{_uses[name]}"


def _initialize(launch: Launch | str, timeout: int) -> None:
    options: dict[str, Any] = {}
    if isinstance(launch, Launch):
        options = {
            "coordinator_address": launch.coordinator,
            "num_processes": launch.processes,
            "process_id": launch.process,
            "local_device_ids": launch.local_device,
            "cluster_detection_method": "deactivate",
        }
    jax.distributed.initialize(initialization_timeout=timeout, **options)


def _meet(launch: Launch, timeout: float) -> None:
    """Whether the coordinator's address works, found out here: JAX would abort the process without saying which."""
    host, _, port = launch.coordinator.rpartition(":")
    host = host.strip("[]")
    if launch.process == 0:
        with socket.socket(socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", int(port)))
            except OSError as error:
                busy = "another program listens there" if error.errno == errno.EADDRINUSE else error.strerror
                raise ProcessError(
                    f"Process 0 cannot listen at port {port} of --coordinator {launch.coordinator}: {busy}. Choose "
                    "another port, the same for all processes."
                ) from error
        return
    begin = time.monotonic()
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=max(1.0, min(timeout, 5.0))).close()
            return
        except OSError as error:
            if time.monotonic() - begin > timeout:
                raise ProcessError(_unreachable(launch, host, timeout, error)) from error
        time.sleep(0.3)


def _unreachable(launch: Launch, host: str, timeout: float, error: OSError) -> str:
    if isinstance(error, socket.gaierror):
        check = f"the name {host} cannot be resolved from {socket.gethostname()}"
    elif isinstance(error, ConnectionRefusedError):
        check = "the machine answers and nothing listens at that port"
    else:
        check = f"{error.strerror or 'no answer'}; a firewall may stand between"
    return (
        f"Process {launch.process} of {launch.processes} did not reach the coordinator at {launch.coordinator} "
        f"({launch.found_in}) in {timeout:.0f} seconds: {check}. Check that process 0 is started, that it runs on that "
        "machine, and that the port is open."
    )


def _refused(launch: Launch | str) -> str:
    me = f"process {launch.process} of {launch.processes}" if isinstance(launch, Launch) else "this process"
    return (
        f"{me} could not join the others; the lines above have JAX's reason. Check that --processes is the same for "
        "all, and --process another number for each."
    )


class _Deadline:
    """Ends the process with a word when JAX waits too long for the others; its own way is a page of stack frames."""

    def __init__(self, launch: Launch | str, timeout: float, begin: float):
        self._launch, self._timeout, self._end, self._met = launch, timeout, begin + timeout, threading.Event()

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
            f"not all processes {where} came together in {self._timeout:.0f} seconds. Check that each was started, with "
            "the same --processes and --coordinator and a --process of its own, and what those that stopped said."
        )
        os._exit(1)

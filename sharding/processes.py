"""Several processes as one job: joining, being watched over, leaving together."""

import atexit
import importlib.metadata
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import jax

from .agreement import agree, problems, state
from .launch import Launch, ProcessError, find_launch
from .rendezvous import Deadline, check_coordinator, refused
from .watch import LINGER, SETTLE, Watch, last_words, say

__all__ = ["Job", "ProcessError", "advise", "join"]

_job: "Job | None" = None


def join(
    coordinator: str | None = None,
    processes: str | int | None = None,
    process: int | None = None,
    *,
    timeout: float = 300,
    grace: float = 30,
) -> "Job":
    """Makes this process part of its job, before anything else is done with JAX. Use the result in a `with`.

    Args:
        coordinator, processes, process: see `Launch`; what is None is found in the environment (see `find_launch`).
        timeout: seconds until all processes must be there.
        grace: seconds without a sign of life after which a process is taken for gone.

    Raises ProcessError for numbers that do not fit and for a coordinator that cannot be reached. Where others do not
    come, or JAX refuses this one, it says so and ends the process.
    """
    launch = find_launch(coordinator, processes, process, os.environ)
    if launch is None:
        return Job(0, 1, None)
    # JAX's service would take SIGTERM for itself, also while nobody asks it.
    jax.config.update("jax_enable_preemption_service", False)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    begin = time.monotonic()
    if isinstance(launch, Launch):
        check_coordinator(launch, timeout)
    last_words(lambda: refused(launch))
    with Deadline(launch, timeout, begin + timeout):
        _initialize(launch, round(timeout) + 60)
    me = state()
    watch = Watch(me.client, me.process_id, me.num_processes, str(me.coordinator_address), grace=grace)
    return Job(me.process_id, me.num_processes, watch)


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
        if self.watch is None:
            return self
        self.watch.start()
        _job = self
        try:
            agree("--processes", str(self.processes))
            agree("the versions of Twinax and JAX", f"{importlib.metadata.version('twinax')} and {jax.__version__}")
        except BaseException as error:
            self._fail(self.watch, error)
            raise
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        global _job
        if self.watch is None:
            return
        if error is not None:
            self._fail(self.watch, error)
            return
        problems("leave")
        self.watch.stop()
        _job = None
        jax.distributed.shutdown()

    def _fail(self, watch: Watch, error: BaseException) -> None:
        if isinstance(error, jax.errors.JaxRuntimeError):
            # Most likely the other end of a collective is gone: the watch, which knows who, has the word.
            watch.grace = min(watch.grace, 10.0)
            say(f"process {self.process}: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
            time.sleep(watch.grace + LINGER)
        text = f"{type(error).__name__}: {error}"
        watch.leaving.set()
        watch.announce(f"process {self.process} of {self.processes} has stopped: {text}")
        # The others can't follow a shutdown in step any more, and JAX would wait for them when Python ends.
        atexit.register(_exit_now, 130 if isinstance(error, KeyboardInterrupt) else 1, self.is_first)
        if not self.is_first:
            time.sleep(SETTLE)
            if (watch.announced_by(0) or "").endswith(f"has stopped: {text}"):
                _exit_now(1, False)  # it befell them all alike, and one has said it


def advise(advice: Callable[[], str]) -> None:
    """What to tell the user to do should the job end early; `advice` is called then."""
    if _job is not None and _job.watch is not None:
        _job.watch.advice = advice


def _exit_now(status: int, is_first: bool) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    if is_first:
        time.sleep(LINGER)  # the service that tells the others lives here
    os._exit(status)

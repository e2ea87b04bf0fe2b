"""Jobs of real processes, for tests: start a program several times, as one job on this machine."""

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
# Far beyond what anything takes: it only keeps a bug from hanging the suite.
TIMEOUT = 400


@dataclass(frozen=True)
class Ended:
    """How a process ended, and what it said. Gloo's own remarks on the standard output are left out."""

    status: int
    out: str
    err: str


def free_port() -> int:
    """A port at which nothing listens; below those that the system gives to whoever asks for any, so that none takes
    it meanwhile."""
    while True:
        port = random.randrange(12_000, 32_000)
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("", port))
            return port


def environment(devices: int, **more: str) -> dict[str, str]:
    """For processes with so many simulated devices."""
    left_out = ("SLURM_", "JOB_COMPLETION", "JOBSET", "JAX_COORD")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(left_out)}
    return {
        **inherited,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_COMPILATION_CACHE_DIR": str(REPOSITORY / ".cache" / "jax"),
        "PYTHONUNBUFFERED": "1",
        **more,
    }


@contextlib.contextmanager
def running(commands: Sequence[Sequence[str]], env: dict[str, str]) -> Iterator[list[subprocess.Popen[str]]]:
    """The processes of some commands, which are killed at the end, with their children, if they are still there."""
    pipe, more = subprocess.PIPE, {"text": True, "cwd": REPOSITORY, "env": env, "start_new_session": True}
    processes = [subprocess.Popen(command, stdout=pipe, stderr=pipe, **more) for command in commands]
    try:
        yield processes
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()


def wait(processes: Sequence[subprocess.Popen[str]]) -> list[Ended]:
    ended = []
    for process in processes:
        out, err = process.communicate(timeout=TIMEOUT)
        ended.append(Ended(process.returncode, "".join(_ours(out)), err))
    return ended


def _ours(out: str) -> Iterator[str]:
    return (line for line in out.splitlines(keepends=True) if "peer ranks" not in line and line.strip())


def run_job(program: Sequence[str], count: int, devices: int, **more: str) -> list[Ended]:
    """Runs `python PROGRAM... PORT COUNT INDEX` for each index, until all have ended."""
    port = str(free_port())
    commands = [[sys.executable, *program, port, str(count), str(index)] for index in range(count)]
    with running(commands, environment(devices, **more)) as processes:
        return wait(processes)

"""How many processes a job has, which of them this is, and where they meet: from flags or from the environment.

No JAX here. What a flag says wins over what the environment says; what neither says is an error that names both.
"""

import dataclasses
import re
from collections.abc import Mapping

PORT = 8476  # of the coordinator, where the environment names a host only
AUTO = "auto"


class ProcessError(ValueError):
    """Processes that cannot become one job, or no longer are; the text says what was seen and what to check."""


@dataclasses.dataclass(frozen=True)
class Launch:
    """One process of a job.

    Attributes:
        coordinator: HOST:PORT at which process 0 listens.
        processes: how many there are.
        process: which one this is, from 0.
        found_in: where this was read, in words.
        local_device: the only accelerator of this machine that this process takes; None for all of them.
    """

    coordinator: str
    processes: int
    process: int
    found_in: str = "flags"
    local_device: int | None = None

    def __post_init__(self) -> None:
        if self.processes < 1:
            raise ProcessError(f"A job has at least one process; --processes is {self.processes}.")
        if not 0 <= self.process < self.processes:
            raise ProcessError(
                f"Processes are numbered from 0, so of {self.processes} the last is {self.processes - 1}; this one is "
                f"said to be {self.process} ({self.found_in}). Check --process and --processes."
            )
        host, _, port = self.coordinator.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise ProcessError(
                f"The coordinator is HOST:PORT, such as node1:{PORT}, with a port from 1 to 65535; got "
                f"{self.coordinator!r} ({self.found_in})."
            )


def find_launch(
    coordinator: str | None, processes: str | int | None, process: int | None, environ: Mapping[str, str]
) -> Launch | str | None:
    """The launch of this process, None for a job of one, or "auto" where JAX finds everything itself.

    Args:
        coordinator, processes, process: the flags; None where not given. `processes` may be "auto".
        environ: the environment, of which the variables of SLURM, of an Indexed Job in a JobSet, and of TPU pods on
            GKE are read.

    Raises ProcessError for numbers that do not fit, and where something is said but not enough.
    """
    if processes is not None and str(processes) != AUTO and not str(processes).isdecimal():
        raise ProcessError(f"--processes takes a whole number, or {AUTO}; got {processes!r}.")
    if processes == AUTO:
        if coordinator is not None or process is not None:
            raise ProcessError(f"--processes {AUTO} leaves everything to JAX; leave out --coordinator and --process.")
        return AUTO
    given = {"coordinator": coordinator, "processes": processes, "process": process}
    if processes is not None and int(processes) == 1 and coordinator is None and process in (None, 0):
        return None
    if all(value is None for value in given.values()) and _is_tpu_pod(environ):
        return AUTO
    found = _slurm(environ) or _jobset(environ) or {}
    source = str(found.pop("found_in", "flags"))
    # In a JobSet the manifest's author says how many there are; without that, a pod may as well be a job of its own.
    if all(value is None for value in given.values()) and found.get("processes") in (None, 1):
        return None
    merged = {**found, **{name: value for name, value in given.items() if value is not None}}
    missing = [f"--{name}" for name in given if merged.get(name) is None]
    if missing:
        said = [f"--{name} {value}" for name, value in given.items() if value is not None]
        raise ProcessError(
            f"A job of several processes needs --coordinator HOST:PORT, --processes N and --process I; "
            f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing. Given: {' '.join(said)}"
            f"{'' if source == 'flags' else f', and from {source}: {_plain(found)}'}. Give the rest, or start under "
            "SLURM (srun) or in a JobSet, which give it themselves."
        )
    if found and any(value is not None for value in given.values()):
        source = f"flags and {source}"
    launch = Launch(found_in=source, **{**merged, "processes": int(merged["processes"])})
    return launch if launch.processes > 1 else None


def _plain(found: Mapping[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in found.items() if value is not None)


def _is_tpu_pod(environ: Mapping[str, str]) -> bool:
    """Whether GKE has put this process into a group of TPU hosts or slices."""
    hosts = [host for host in environ.get("TPU_WORKER_HOSTNAMES", "").split(",") if host]
    return len(hosts) > 1 or int(environ.get("MEGASCALE_NUM_SLICES") or 1) > 1


def _number(environ: Mapping[str, str], name: str) -> int:
    try:
        return int(environ[name])
    except ValueError:
        raise ProcessError(f"The environment says {name}={environ[name]!r}, which is not a number.") from None


def _slurm(environ: Mapping[str, str]) -> dict[str, object] | None:
    """A task of a job step, as `srun` starts it. The batch script itself is in no step: it is one process."""
    if not {"SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID"} <= environ.keys():
        return None
    count = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS"
    if count not in environ:
        return None
    host = first_host(environ["SLURM_STEP_NODELIST"])
    # Two jobs that share a node must not share a port.
    port = 61440 + _number(environ, "SLURM_JOB_ID") % 4096
    return {
        "coordinator": f"{host}:{port}",
        "processes": _number(environ, count),
        "process": _number(environ, "SLURM_PROCID"),
        "local_device": _slurm_device(environ),
        "found_in": "SLURM",
    }


def _slurm_device(environ: Mapping[str, str]) -> int | None:
    """The accelerator of a task that shares its node, and sees the accelerators of the others."""
    here = re.match(r"\d+", environ.get("SLURM_STEP_TASKS_PER_NODE", "1"))
    alone = here is None or int(here[0]) == 1
    bound = len(environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")) == 1  # --gpus-per-task has done it
    return None if alone or bound or "SLURM_LOCALID" not in environ else _number(environ, "SLURM_LOCALID")


def first_host(hosts: str) -> str:
    """The first name of a SLURM node list, such as "node003" of "node[003-010,014],login"."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", hosts)
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first[0] if first else hosts)


def _jobset(environ: Mapping[str, str]) -> dict[str, object] | None:
    """A pod of an Indexed Job. JobSet's names come by the downward API, as in deploy/jobset.yaml."""
    if "JOB_COMPLETION_INDEX" not in environ:
        return None
    found: dict[str, object] = {"process": _number(environ, "JOB_COMPLETION_INDEX"), "found_in": "the JobSet"}
    name, job = environ.get("JOBSET_NAME"), environ.get("REPLICATED_JOB_NAME")
    if name and job:
        found["coordinator"] = f"{name}-{job}-0-0.{name}:{PORT}"
    return found

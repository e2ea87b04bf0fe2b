"""Devices that are described and not there, to compile for."""

import importlib
import importlib.util
import os
import pkgutil
from typing import Any

from .errors import CompileFailed, CompilerMissing
from .topology import Topology

# libtpu asks the machine which TPU it is on and must be told not to; read when it is loaded.
TPU_SETTINGS = {
    "JAX_PLATFORMS": "cpu",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",  # also of the files that it leaves in the temporary folder, gigabytes in bad cases
}


def settings(topology: Topology) -> dict[str, str]:
    """Environment variables of a process that compiles for `topology`; they must be set before JAX is imported."""
    return TPU_SETTINGS if topology.chip.platform == "tpu" else {"JAX_PLATFORMS": "cpu"}


def check_compiler(topology: Topology) -> None:
    """Raises CompilerMissing, saying what to install, unless this Python can compile for `topology`."""
    if topology.chip.platform == "tpu" and importlib.util.find_spec("libtpu") is None:
        raise CompilerMissing(
            f"Compiling for {topology} needs libtpu, which is not installed: pip install 'twinax[tpu]' (no TPU is "
            "needed). Without it, --compile 0 plans by the analytic model alone."
        )
    if topology.chip.platform == "cuda" and not has_cuda_plugin():
        raise CompilerMissing(
            f"Compiling for {topology} needs JAX's CUDA plug-in, which is not installed: pip install 'twinax[cuda13]' "
            "(no GPU is needed). Without it, GPUs are planned by the analytic model alone."
        )


def has_cuda_plugin() -> bool:
    """Whether JAX's plug-in for CUDA is installed, of whichever version."""
    if importlib.util.find_spec("jax_plugins") is None:
        return False
    folder = importlib.import_module("jax_plugins").__path__
    return any("cuda" in module.name for module in pkgutil.iter_modules(folder))


def find_devices(topology: Topology) -> list[Any]:
    """The JAX devices of `topology`, to make a mesh of. Raises CompileFailed when the compiler does not know it."""
    from jax.experimental import topologies

    if missing := [name for name, value in settings(topology).items() if os.environ.get(name) != value]:
        raise RuntimeError(f"Set {', '.join(missing)} before importing JAX (see devices.settings).")
    try:
        if topology.chip.platform == "cuda":
            from .gpu_target import target_config

            found = topologies.get_topology_desc(
                platform="cuda",
                topology_name=str(topology),
                topology=_gpu_shape(topology),
                target_config=target_config(topology.chip),
            )
        else:
            shape = (*topology.shape, 1)[:3]
            options: dict[str, Any] = {"wrap": (*topology.wraps, False)[:3]}
            if topology.chips == 1:
                options["chips_per_host_bounds"] = (1, 1, 1)
            if topology.chip.name == "v4":
                options["chip_config_name"] = "megacore"  # both cores as one device, as v4 is run
            name = f"{topology.chip.name}:{'x'.join(map(str, shape))}"
            found = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except Exception as error:
        raise CompileFailed(f"The compiler does not take the topology {topology}: {error}") from error
    return list(found.devices)


def _gpu_shape(topology: Topology) -> str:
    """Partitions, hosts and devices of one host."""
    node = min(topology.devices, topology.chip.node)
    return f"1x{topology.devices // node}x{node}"

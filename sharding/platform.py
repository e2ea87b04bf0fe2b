"""Which kind of device a program is traced for. It is not always this machine's: a laptop compiles for a TPU."""

from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache


def platform() -> str:
    """That is "cpu", "tpu" or "gpu": of the mesh in use (see `rules.use`), or JAX's default without one."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def distrust_compile_cache(devices: Sequence[Any]) -> None:
    """Stops JAX from reading or writing its compile cache in this process, if these are several CPU devices.

    XLA tells the collectives of a program apart by the order in which each device runs them, and JAX gives all permutes
    the same number. A CPU program read from the cache has lost that order between a loop's collectives and those
    beside it (jaxlib 0.10.2): messages get mixed up, now and then, and the numbers are wrong.
    """
    if len(devices) > 1 and devices[0].platform == "cpu" and jax.config.values["jax_enable_compilation_cache"]:
        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()

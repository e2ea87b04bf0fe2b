"""Which kind of device a program is traced for. It is not always this machine's: a laptop compiles for a TPU."""

import jax


def platform() -> str:
    """That is "cpu", "tpu" or "gpu": of the mesh in use (see `rules.use`), or JAX's default without one."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform

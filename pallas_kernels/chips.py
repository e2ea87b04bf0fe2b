"""The chip that a program is traced for: it decides which kernel runs, and with which block sizes."""

import jax

# How JAX calls a device, and how we and the topologies do. Of two cores a chip, each is a device or both are one.
TPUS = {
    "TPU v4": "v4",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "7x",
    "TPU v7x": "7x",
}
CORES = {"v4": 2, "v5p": 2}  # that are one device, and that one program is for
GPUS = ("A100", "H100", "H200", "B200", "B300", "GB200", "GB300")


def known_platform() -> str | None:
    """ "cpu", "tpu", "cuda" or "rocm" when that is certain while tracing, else None.

    It is the platform of the mesh in use; without one, "cpu" in a process that has nothing else.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None:
        # JAX says "gpu" of devices that are there, "cuda" or "rocm" of described ones.
        gpu = "rocm" if device.device_kind.startswith("AMD") else "cuda"
        return gpu if device.platform == "gpu" else device.platform
    return "cpu" if jax.default_backend() == "cpu" else None


def target_chip() -> str | None:
    """The chip's name in lower case ("v5e", "v5p", "v6e", "7x", "h200", ...), or None for a CPU or an unknown one.

    Of the mesh in use, else of this process's first device.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    kind = jax.devices()[0].device_kind if device is None else device.device_kind
    if kind in TPUS:
        return TPUS[kind]
    return next((name.lower() for name in reversed(GPUS) if name in kind), None)

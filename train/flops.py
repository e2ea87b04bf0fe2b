"""How much arithmetic a token takes, how much the devices can do, and so how busy they are (MFU)."""

import dataclasses
import math
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ..models.config import RECURRENT, DecoderConfig
from ..models.decoder import param_axes, param_shapes

# Dense bfloat16 FLOP/s of one JAX device, by the beginning of its `device_kind`; from the vendors' data sheets.
PEAKS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 1153.5e12,  # a chip is two devices
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA GB200": 2500e12,
}


@dataclasses.dataclass(frozen=True)
class Peak:
    """FLOP/s of all devices together, None when unknown, and where the number is from."""

    flops: float | None
    source: str


def flops_per_token(config: DecoderConfig, sequence_length: int) -> float:
    """FLOPs of forward and backward for one token: 6 for each weight of a product, and the attention's own.

    The embedding's rows are looked up, not multiplied, and of many experts a token takes a few. A causal token sees
    half the row on average; a state is updated and read once a token (what chunks multiply besides, and what `remat`
    computes again, is not counted).
    """
    shapes, axes = param_shapes(config), param_axes(config)
    taken = 1.0 if config.moe is None else config.moe.experts_per_token / config.moe.num_experts
    weights = sum(
        math.prod(shape.shape) * (taken if "experts" in axes[name] else 1)
        for name, shape in shapes.items()
        if name != "embed.weight" or config.tie_embeddings
    )
    attention = len(config.layers_with("attention")) * config.num_heads * config.head_dim * sequence_length
    if (latent := config.latent) is not None:
        size = (latent.nope_dim + latent.rope_dim + latent.value_dim) / 2  # of a score's product, and of a value's
        attention += len(config.layers_with("latent_attention")) * config.num_heads * size * sequence_length
    states = sum(
        2 * len(config.layers_with(mixer)) * math.prod(getattr(config, field).states["state"])
        for mixer, field in RECURRENT.items()
        if mixer in config.mixers
    )
    return 6.0 * (weights + attention + states)


def peak_flops(devices: Sequence[Any], dtype: Any) -> Peak:
    """What `devices` can do: from the table, or on a CPU measured by a product of matrices in `dtype` (0.2 s)."""
    kind = devices[0].device_kind
    if devices[0].platform == "cpu":
        # Simulated devices share the same cores, so their number does not matter.
        return Peak(_measure(devices[0], dtype), "measured matmul peak")
    for name, flops in PEAKS.items():
        if kind.startswith(name):
            return Peak(flops * len(devices), f"bfloat16 peak of {len(devices)} x {kind}")
    return Peak(None, f"unknown peak of {kind}")


def _measure(device: Any, dtype: Any, size: int = 1024, seconds: float = 0.2) -> float:
    a = jax.device_put(jnp.ones((size, size), dtype), device)
    product = jax.jit(lambda a, b: a @ b)
    product(a, a).block_until_ready()
    best, start = math.inf, time.perf_counter()
    while (begin := time.perf_counter()) - start < seconds:
        product(a, a).block_until_ready()
        best = min(best, time.perf_counter() - begin)
    return 2.0 * size**3 / best

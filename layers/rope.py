"""Rotary position embedding (Su et al., 2021, arXiv:2104.09864), with the frequency scaling of Llama 3.1.

Shapes: H heads, D head size.
"""

import jax
import jax.numpy as jnp
import numpy as np

from .rope_config import RopeConfig


def frequencies(config: RopeConfig, head_dim: int) -> np.ndarray:
    """Radians a token for each pair of the head: float64 [D / 2], slowest last."""
    inverse = config.theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    scaling = config.scaling
    if scaling is None:
        return inverse
    turns = scaling.original_context * inverse / (2 * np.pi)  # full turns within the original context
    blend = (turns - scaling.low_frequency_factor) / (scaling.high_frequency_factor - scaling.low_frequency_factor)
    blend = np.clip(blend, 0.0, 1.0)
    return blend * inverse + (1 - blend) * inverse / scaling.factor


def angles(config: RopeConfig, head_dim: int, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine for int positions [...], each float32 (float64 under x64) [..., 1, D / 2]."""
    inverse = jnp.asarray(frequencies(config, head_dim))
    theta = positions[..., None, None].astype(inverse.dtype) * inverse
    return jnp.cos(theta), jnp.sin(theta)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turns heads [..., H, D]; pair i is (x[i], x[i + D / 2]), the order of Hugging Face's weights."""
    first, second = jnp.split(x.astype(cos.dtype), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)

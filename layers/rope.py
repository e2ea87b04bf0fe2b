"""Rotary position embedding (Su et al., 2021, arXiv:2104.09864), and the stretches of `rope_config`.

Shapes: H heads, D head size, P pairs of rotated numbers.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from .rope_config import DynamicScaling, LinearScaling, Llama3Scaling, LongRopeScaling, RopeConfig, YarnScaling


def frequencies(config: RopeConfig, head_dim: int) -> np.ndarray:
    """Radians a token for each pair: float64 [P], slowest last; for short sequences, where length matters."""
    size = config.size or head_dim
    inverse = config.theta ** -(np.arange(0, size, 2, dtype=np.float64) / size)
    match config.scaling:
        case LinearScaling(factor):
            return inverse / factor
        case Llama3Scaling() as scaling:
            turns = scaling.original_context * inverse / (2 * np.pi)  # full turns within the original context
            span = scaling.high_frequency_factor - scaling.low_frequency_factor
            kept = np.clip((turns - scaling.low_frequency_factor) / span, 0.0, 1.0)
            return kept * inverse + (1 - kept) * inverse / scaling.factor
        case YarnScaling() as scaling:
            kept = _yarn_kept(config.theta, size, scaling)
            return kept * inverse + (1 - kept) * inverse / scaling.factor
        case LongRopeScaling(short):
            return inverse / _divisors(short, size)
    return inverse


def _yarn_kept(theta: float, size: int, scaling: YarnScaling) -> np.ndarray:
    """The share of each pair's own frequency that stays: a ramp between two pairs, by their turns."""

    def pair(turns: float) -> float:
        return size * math.log(scaling.original_context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair(scaling.beta_fast), pair(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    high += 0.001 * (low == high)
    return 1 - np.clip((np.arange(size // 2) - low) / (high - low), 0, 1)


def _divisors(given: tuple[float, ...], size: int) -> np.ndarray:
    if len(given) != size // 2:
        raise ValueError(f"Long rope needs a factor for each of the {size // 2} pairs of a head; got {len(given)}.")
    return np.asarray(given)


def angles(
    config: RopeConfig, head_dim: int, positions: jax.Array, lengths: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine for int positions [...], each float32 (float64 under x64) [..., 1, P].

    Args:
        lengths: int [...], tokens of the sequence that each position is in; needed where `config.by_length`.
    """
    inverse = jnp.asarray(frequencies(config, head_dim))
    theta = positions[..., None, None].astype(inverse.dtype)
    scaling = config.scaling
    if scaling is None or not config.by_length:
        theta = theta * inverse
    else:
        assert lengths is not None, "rope of this kind needs the lengths of the sequences"
        theta = theta * _by_length(config, head_dim, lengths[..., None, None], inverse)
    factor = getattr(scaling, "attention_factor", 1.0)
    return factor * jnp.cos(theta), factor * jnp.sin(theta)


def _by_length(config: RopeConfig, head_dim: int, length: jax.Array, inverse: jax.Array) -> jax.Array:
    """Frequencies [..., 1, P] for sequences of `length` [..., 1, 1]."""
    size, scaling = config.size or head_dim, config.scaling
    if isinstance(scaling, LongRopeScaling):
        slow = config.theta ** -(np.arange(0, size, 2, dtype=np.float64) / size) / _divisors(scaling.long, size)
        return jnp.where(length > scaling.original_context, jnp.asarray(slow, inverse.dtype), inverse)
    assert isinstance(scaling, DynamicScaling)
    context = scaling.original_context
    longer = jnp.maximum(length, context).astype(inverse.dtype)
    base = config.theta * (scaling.factor * longer / context - (scaling.factor - 1)) ** (size / (size - 2))
    return base ** -jnp.asarray(np.arange(0, size, 2) / size, inverse.dtype)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turns heads [..., H, D]; pair i is (x[i], x[i + P]), the order of Hugging Face's weights. The rest stays."""
    size = 2 * cos.shape[-1]
    turned, rest = x[..., :size], x[..., size:]
    first, second = jnp.split(turned.astype(cos.dtype), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
    return turned if size == x.shape[-1] else jnp.concatenate([turned, rest], axis=-1)

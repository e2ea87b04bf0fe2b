"""Sums over the last axis that do not depend on how many rows there are."""

import jax
import jax.numpy as jnp

from ..pallas_kernels.chips import known_platform


def row_sum(x: jax.Array) -> jax.Array:
    """[..., D] to [..., 1], float32 or wider.

    A served request's numbers must not depend on its neighbours. XLA:CPU adds up the rows of an array of fewer than
    4,096 numbers in another order than those of a larger one. A product with ones does not; its gradient takes longer,
    so it is for rows that are short enough for eight of them, the fewest that are served, to be such an array.
    """
    if known_platform() != "cpu" or x.shape[-1] >= 512:
        return jnp.sum(x, axis=-1, keepdims=True)
    return jnp.einsum("...d,od->...o", x, jnp.ones((1, x.shape[-1]), x.dtype), precision=jax.lax.Precision.HIGHEST)


def row_mean(x: jax.Array) -> jax.Array:
    """As `row_sum`, divided by D."""
    return row_sum(x) / x.shape[-1]

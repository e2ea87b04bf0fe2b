"""The order of tokens that makes every device of a ring do equal work under a causal mask.

A row is cut into 2n chunks, and device i of n holds chunks i and 2n - 1 - i, one early and one late: whichever device
its keys come from, half of the products count (the imbalance: Brandon et al. 2023, arXiv:2311.09431; this remedy: Llama
3, arXiv:2407.21783, section 3.3.2).
"""

import jax
import jax.numpy as jnp


def zigzag(x: jax.Array, devices: int, axis: int = -1) -> jax.Array:
    """`x` with its tokens, along `axis`, in the order in which the devices hold them.

    ValueError unless the tokens are a multiple of twice the devices.
    """
    axis = axis % x.ndim
    x = x.reshape(*x.shape[:axis], 2, devices, _chunk(x.shape[axis], devices), *x.shape[axis + 1 :])
    early, late = jnp.split(x, 2, axis)
    pairs = jnp.concatenate([early, jnp.flip(late, axis + 1)], axis)
    return _joined(jnp.swapaxes(pairs, axis, axis + 1), axis)


def unzigzag(x: jax.Array, devices: int, axis: int = -1) -> jax.Array:
    """The inverse of `zigzag`."""
    axis = axis % x.ndim
    x = x.reshape(*x.shape[:axis], devices, 2, _chunk(x.shape[axis], devices), *x.shape[axis + 1 :])
    early, late = jnp.split(jnp.swapaxes(x, axis, axis + 1), 2, axis)
    return _joined(jnp.concatenate([early, jnp.flip(late, axis + 1)], axis), axis)


def _chunk(tokens: int, devices: int) -> int:
    if tokens % (2 * devices):
        raise ValueError(
            f"A ring of {devices} devices holds two chunks of a row on each: the tokens must be a multiple of "
            f"{2 * devices}, got {tokens}. Pad the rows, or use fewer devices."
        )
    return tokens // (2 * devices)


def _joined(x: jax.Array, axis: int) -> jax.Array:
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 3 :])

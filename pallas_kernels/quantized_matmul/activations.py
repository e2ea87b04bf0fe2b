"""The functions that a product can end with, in the dtype of its sums."""

from functools import partial

import jax

ACTIVATIONS = {
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
}


def finish(
    sums_MO: jax.Array, bias_O: jax.Array | None, activation: str | None, out_dtype: jax.typing.DTypeLike
) -> jax.Array:
    """Bias, activation, and the one rounding."""
    if bias_O is not None:
        sums_MO = sums_MO + bias_O.astype(sums_MO.dtype)
    if activation is not None:
        sums_MO = ACTIVATIONS[activation](sums_MO)
    return sums_MO.astype(out_dtype)

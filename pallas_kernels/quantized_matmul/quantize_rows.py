"""Activations, quantised by row and block of inputs.

Shapes: M rows   I inputs   G blocks of inputs   B inputs of a block
"""

import jax
import jax.numpy as jnp

from .formats import FLOAT8, LARGEST

FORMATS = {"int8": ("int8", jnp.dtype(jnp.int8)), "fp8": ("fp8_e4m3", FLOAT8)}


def quantize_rows(
    x_MI: jax.Array, format: str, size: int, scale: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Values [M, G, B] in int8 or float8, the last block filled with zeros, and float32 scales [M, G].

    `size` is B. With `scale`, all have that one and larger values, inf too, saturate. Else a row that is not finite has
    no finite scale, and so a result that is not; one with nan has none in any case.
    """
    M, I = x_MI.shape
    G = -(-I // size)
    name, dtype = FORMATS[format]
    x_MGB = jnp.pad(x_MI.astype(jnp.float32), [(0, 0), (0, G * size - I)]).reshape(M, G, size)
    if scale is None:
        reach_MG = jnp.max(jnp.abs(x_MGB), axis=2)
        # Times the reciprocal, as XLA makes of a division by a constant or not. Not below the smallest normal number:
        # smaller ones may be taken for zero, and 1 / scale must be finite.
        scales_MG = jnp.maximum(reach_MG * jnp.float32(1 / LARGEST[name]), jnp.finfo(jnp.float32).tiny)
    else:
        scales_MG = jnp.where(jnp.isnan(x_MGB).any(2), jnp.nan, scale.astype(jnp.float32))
    values = x_MGB / scales_MG[..., None]
    if format == "int8":
        values = jnp.round(values)
    # What is not a number has no int8; its row's scale says so.
    values = jnp.where(jnp.isnan(values), 0, jnp.clip(values, -LARGEST[name], LARGEST[name]))
    return values.astype(dtype), scales_MG

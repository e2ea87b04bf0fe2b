"""What the grouped products mean, in the plainest `jax.numpy`: every row with a copy of its group's weight.

Shapes: N rows, G groups, I inputs, O outputs. For tests only: it holds N weights.
"""

import jax
import jax.numpy as jnp

from ..quantized_matmul import QuantizedWeight, dequantize

EXACT = jax.lax.Precision.HIGHEST


def _rows(x_NA: jax.Array, sizes_G: jax.Array) -> tuple[jax.Array, jax.Array]:
    """In float32 or wider, the rows of no group zeros, and the group of each row; G for those of none."""
    group_N = jnp.searchsorted(jnp.cumsum(sizes_G), jnp.arange(len(x_NA)), side="right")
    wide = jnp.promote_types(x_NA.dtype, jnp.float32)
    return jnp.where((group_N < len(sizes_G))[:, None], x_NA, 0).astype(wide), group_N


def grouped_matmul(x_NI: jax.Array, weight_GOI: jax.Array | QuantizedWeight, sizes_G: jax.Array) -> jax.Array:
    if isinstance(weight_GOI, QuantizedWeight):
        weight_GOI = dequantize(weight_GOI, x_NI.dtype)
    rows_NI, group_N = _rows(x_NI, sizes_G)
    weight_NOI = weight_GOI.astype(rows_NI.dtype)[jnp.minimum(group_N, len(sizes_G) - 1)]
    return jnp.einsum("ni,noi->no", rows_NI, weight_NOI, precision=EXACT).astype(x_NI.dtype)


def grouped_matmul_dx(dy_NO: jax.Array, weight_GOI: jax.Array | QuantizedWeight, sizes_G: jax.Array) -> jax.Array:
    if isinstance(weight_GOI, QuantizedWeight):
        weight_GOI = dequantize(weight_GOI, dy_NO.dtype)
    return grouped_matmul(dy_NO, jnp.swapaxes(weight_GOI, 1, 2), sizes_G)


def grouped_matmul_dweight(x_NI: jax.Array, dy_NO: jax.Array, sizes_G: jax.Array) -> jax.Array:
    (rows_NI, group_N), (dy_rows_NO, _) = _rows(x_NI, sizes_G), _rows(dy_NO, sizes_G)
    is_in_NG = (group_N[:, None] == jnp.arange(len(sizes_G))).astype(rows_NI.dtype)
    return jnp.einsum("ng,no,ni->goi", is_in_NG, dy_rows_NO, rows_NI, precision=EXACT).astype(x_NI.dtype)

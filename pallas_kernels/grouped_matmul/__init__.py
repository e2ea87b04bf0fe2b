"""Products of rows with the weights of their group, dropping none: what a mixture of experts is made of.

As in MegaBlocks (Gale et al. 2022, arXiv:2211.15841). What each product means is in `reference.py`. Shapes, here and in
every candidate:
  N rows, sorted by group   G groups   I inputs   O outputs
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from ..candidates import Operation
from ..quantized_matmul import QuantizedWeight

OPERATION = Operation(__name__, "grouped_matmul")
DX = Operation(__name__, "grouped_matmul_dx")
DWEIGHT = Operation(__name__, "grouped_matmul_dweight")


def grouped_matmul(
    x_NI: jax.Array, weight_GOI: jax.Array | QuantizedWeight, sizes_G: jax.Array, *, implementation: str | None = None
) -> jax.Array:
    """`x @ weight[group].T` in the dtype of `x`, [N, O]; differentiable in x and weight (reverse mode).

    The first `sizes[0]` rows are those of group 0, and so on. Rows beyond the sum of the sizes belong to no group: they
    give zeros, take whatever they hold, and pass no gradient. A group may be empty.

    Products take the dtype of `x` and add up in float32 (float64 for float64).

    Args:
      x_NI: rows. weight_GOI: one weight a group, of the same floating dtype; or quantised ones, stacked: they stand
        for `dequantize(weight, x.dtype)` and get no gradient.
      sizes_G: int32, the rows of each group, none negative; their sum is at most N (not checked).
      implementation: a candidate's name, or None for the best one of the platform.

    Raises:
      ValueError: shapes or dtypes that break the rules above. NotImplementedError: no candidate takes them.
    """
    x_NI, weight_GOI, sizes_G = jax.tree.map(jnp.asarray, (x_NI, weight_GOI, sizes_G))
    _check("x [N, I]", x_NI, weight_GOI, sizes_G, axis=2)
    return _differentiable(implementation, x_NI, weight_GOI, sizes_G)


def grouped_matmul_dx(
    dy_NO: jax.Array, weight_GOI: jax.Array | QuantizedWeight, sizes_G: jax.Array, *, implementation: str | None = None
) -> jax.Array:
    """`dy @ weight[group]`, [N, I] in the dtype of `dy`: the gradient of the rows. Otherwise as `grouped_matmul`.

    It is the product with transposed weights, and a forward one where weights are kept as [G, I, O].
    """
    dy_NO, weight_GOI, sizes_G = jax.tree.map(jnp.asarray, (dy_NO, weight_GOI, sizes_G))
    _check("dy [N, O]", dy_NO, weight_GOI, sizes_G, axis=1)
    return DX(dy_NO, weight_GOI, sizes_G, implementation=implementation)


def grouped_matmul_dweight(
    x_NI: jax.Array, dy_NO: jax.Array, sizes_G: jax.Array, *, implementation: str | None = None
) -> jax.Array:
    """`dy[rows of g].T @ x[rows of g]` for each group g, [G, O, I] in the dtype of `x`: the gradient of the weights.

    Zeros for an empty group. Rows beyond the sum of the sizes take whatever they hold. Otherwise as `grouped_matmul`.
    """
    x_NI, dy_NO, sizes_G = map(jnp.asarray, (x_NI, dy_NO, sizes_G))
    if x_NI.ndim != 2 or dy_NO.ndim != 2 or len(x_NI) != len(dy_NO):
        raise ValueError(f"x [N, I] and dy [N, O] have as many rows, got {x_NI.shape} and {dy_NO.shape}")
    _check_dtypes(x_NI, dy_NO, "dy", sizes_G)
    return DWEIGHT(x_NI, dy_NO, sizes_G, implementation=implementation)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _differentiable(implementation: str | None, x_NI: jax.Array, weight_GOI: Any, sizes_G: jax.Array) -> jax.Array:
    return OPERATION(x_NI, weight_GOI, sizes_G, implementation=implementation)


def _forward(implementation: str | None, *args: Any) -> tuple[jax.Array, Any]:
    x_NI, weight_GOI, sizes_G = args
    # Rows are for the gradient of the weights, which quantised ones have not.
    kept = (x_NI[:0] if isinstance(weight_GOI, QuantizedWeight) else x_NI), weight_GOI, sizes_G
    return _differentiable(implementation, *args), kept


def _backward(implementation: str | None, kept: Any, dy_NO: jax.Array) -> tuple[jax.Array, Any, None]:
    x_NI, weight_GOI, sizes_G = kept
    dx_NI = DX(dy_NO, weight_GOI, sizes_G, implementation=implementation)
    if isinstance(weight_GOI, QuantizedWeight):
        return dx_NI, None, None
    return dx_NI, DWEIGHT(x_NI, dy_NO, sizes_G, implementation=implementation), None


_differentiable.defvjp(_forward, _backward)


def _check(what: str, rows_NA: jax.Array, weight_GOI: Any, sizes_G: jax.Array, axis: int) -> None:
    quantized = isinstance(weight_GOI, QuantizedWeight)
    if quantized:
        weight_GOI.check()
    shape = weight_GOI.shape
    if rows_NA.ndim != 2 or len(shape) != 3 or rows_NA.shape[1] != shape[axis]:
        raise ValueError(f"grouped_matmul takes {what} and weight [G, O, I], got {rows_NA.shape}, {shape}")
    if sizes_G.shape != shape[:1]:
        raise ValueError(f"sizes has one number a group, ({shape[0]},), got {sizes_G.shape}")
    _check_dtypes(rows_NA, rows_NA if quantized else weight_GOI, "weight", sizes_G)


def _check_dtypes(rows_NA: jax.Array, other: jax.Array, name: str, sizes_G: jax.Array) -> None:
    if rows_NA.dtype != other.dtype or not jnp.issubdtype(rows_NA.dtype, jnp.floating):
        raise ValueError(f"rows and {name} have one floating dtype, got {rows_NA.dtype} and {other.dtype}")
    if sizes_G.ndim != 1 or len(sizes_G) < 1 or sizes_G.dtype != jnp.int32:
        raise ValueError(f"sizes is int32, at least one group; got {sizes_G.dtype}{sizes_G.shape}")

"""Grouped products without Pallas.

Shapes: N rows, sorted by group, G groups, I inputs, O outputs, A and C either of them, B rows of a block, M = N + B.

On accelerators a product is `ragged_dot`. Two places have none that is fast, and there a loop takes the rows of each
group in blocks of B and reads the group's weights once a block:

- XLA:CPU computes `ragged_dot` as one dense product that is G times as large (measured on 2 cores, float32, 4,096 rows
  of 512 to 512: 32 groups took 1,480 ms, the loop 41 ms, one dense product of all rows 16 ms);
- the gradient of the weights is such a dense product on TPUs too.

On a CPU a row's result does not depend on the rows around it, on its place or on N, bit for bit: a server needs that.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp

from ..quantized_matmul import QuantizedWeight, dequantize

Weights = jax.Array | QuantizedWeight
SMALLEST_BLOCK, LARGEST_BLOCK = 8, 128


def grouped_matmul(x_NI: jax.Array, weight_GOI: Weights, sizes_G: jax.Array) -> jax.Array:
    return _product(x_NI, weight_GOI, sizes_G, contract=2)


def grouped_matmul_dx(dy_NO: jax.Array, weight_GOI: Weights, sizes_G: jax.Array) -> jax.Array:
    return _product(dy_NO, weight_GOI, sizes_G, contract=1)


def grouped_matmul_dweight(x_NI: jax.Array, dy_NO: jax.Array, sizes_G: jax.Array) -> jax.Array:
    # XLA:CPU has no product of bfloat16 with a float32 sum; widening it first changes no bit of the result.
    return jax.lax.platform_dependent(
        x_NI, dy_NO, sizes_G, cpu=partial(_weight_gradient, widen=True), default=partial(_weight_gradient, widen=False)
    )


def _precision(dtype: jnp.dtype) -> jax.lax.Precision:
    """Full precision for float32 and wider (TPUs would round to bfloat16), the native one for narrower types."""
    return jax.lax.Precision.HIGHEST if jnp.dtype(dtype).itemsize >= 4 else jax.lax.Precision.DEFAULT


def _product(x_NA: jax.Array, weight_GOI: Weights, sizes_G: jax.Array, contract: int) -> jax.Array:
    """Rows times weights, summed over dimension `contract` of the weights: [N, C]."""
    y_NC = jax.lax.platform_dependent(
        x_NA,
        weight_GOI,
        sizes_G,
        cpu=partial(_by_blocks, contract=contract),
        default=partial(_by_ragged_dot, contract=contract),
    )
    is_grouped_N = jnp.arange(len(x_NA)) < jnp.sum(sizes_G)
    return jnp.where(is_grouped_N[:, None], y_NC, 0)


def _by_ragged_dot(x_NA: jax.Array, weight_GOI: Weights, sizes_G: jax.Array, contract: int) -> jax.Array:
    if isinstance(weight_GOI, QuantizedWeight):
        weight_GOI = dequantize(weight_GOI, x_NA.dtype)
    numbers = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((1,), (contract,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[0]
    )
    return jax.lax.ragged_dot_general(x_NA, weight_GOI, sizes_G, numbers, precision=_precision(x_NA.dtype))


def _by_blocks(x_NA: jax.Array, weight_GOI: Weights, sizes_G: jax.Array, contract: int) -> jax.Array:
    N, C = len(x_NA), weight_GOI.shape[3 - contract]
    blocks, wide = _Blocks(N, sizes_G), jnp.promote_types(x_NA.dtype, jnp.float32)
    x_MA = jnp.pad(x_NA, ((0, blocks.rows), (0, 0)))

    def body(index: jax.Array, y_MC: jax.Array) -> jax.Array:
        group, start, _ = blocks.at(index)
        x_BA = jax.lax.dynamic_slice_in_dim(x_MA, start, blocks.rows)
        y_BC = jnp.einsum(
            "ba,ca->bc" if contract == 2 else "ba,ac->bc",
            x_BA,
            _of_group(weight_GOI, group, x_NA.dtype),
            precision=_precision(x_NA.dtype),
            preferred_element_type=wide,  # XLA:CPU has no quick kernel with results of bfloat16
        ).astype(x_NA.dtype)
        # What a group's last block writes beyond its rows is not theirs; the next group's first block comes after it.
        return jax.lax.dynamic_update_slice_in_dim(y_MC, y_BC, start, axis=0)

    y_MC = jax.lax.fori_loop(0, blocks.count, body, jnp.zeros((N + blocks.rows, C), x_NA.dtype))
    return y_MC[:N]


def _of_group(weight_GOI: Weights, group: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """One group's weight; of quantised ones, only this is turned into floats at a time."""
    weight_OI = jax.tree.map(lambda a: a[group], weight_GOI)
    return dequantize(weight_OI, dtype) if isinstance(weight_OI, QuantizedWeight) else weight_OI


def _weight_gradient(x_NI: jax.Array, dy_NO: jax.Array, sizes_G: jax.Array, widen: bool) -> jax.Array:
    (N, I), O, G = x_NI.shape, dy_NO.shape[1], len(sizes_G)
    dtype, wide = x_NI.dtype, jnp.promote_types(x_NI.dtype, jnp.float32)
    blocks = _Blocks(N, sizes_G)
    x_MI, dy_MO = (jnp.pad(a, ((0, blocks.rows), (0, 0))) for a in (x_NI, dy_NO))

    def body(index: jax.Array, dweight_GOI: jax.Array) -> jax.Array:
        group, start, left = blocks.at(index)
        own_B1 = (jnp.arange(blocks.rows) < left)[:, None]
        # Both sides: a row that is not the group's may hold anything, and 0 times infinity is not 0.
        x_BI = jnp.where(own_B1, jax.lax.dynamic_slice_in_dim(x_MI, start, blocks.rows), 0)
        dy_BO = jnp.where(own_B1, jax.lax.dynamic_slice_in_dim(dy_MO, start, blocks.rows), 0)
        if widen:
            x_BI, dy_BO = x_BI.astype(wide), dy_BO.astype(wide)
        return dweight_GOI.at[group].add(
            jnp.einsum("bo,bi->oi", dy_BO, x_BI, precision=_precision(dtype), preferred_element_type=wide)
        )

    return jax.lax.fori_loop(0, blocks.count, body, jnp.zeros((G, O, I), wide)).astype(dtype)


class _Blocks:
    """The rows of each group cut into blocks: `rows` in one, `count` of them in all."""

    def __init__(self, N: int, sizes_G: jax.Array):
        # About what a group has when all have the same: more would compute with rows that are not the group's.
        even = max(1, N // len(sizes_G))
        self.rows = min(LARGEST_BLOCK, max(SMALLEST_BLOCK, 1 << math.ceil(math.log2(even))))
        self._sizes_G = sizes_G.astype(jnp.int32)
        self._blocks_G = -(-self._sizes_G // self.rows)
        self._end_G = jnp.cumsum(self._blocks_G, dtype=jnp.int32)
        self._first_row_G = jnp.cumsum(self._sizes_G, dtype=jnp.int32) - self._sizes_G
        self.count = self._end_G[-1]

    def at(self, index: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Of block `index`: its group, its first row, and how many rows the group has from there on."""
        group = jnp.sum(self._end_G <= index, dtype=jnp.int32)
        before = (index - (self._end_G[group] - self._blocks_G[group])).astype(jnp.int32) * self.rows
        return group, self._first_row_G[group] + before, self._sizes_G[group] - before

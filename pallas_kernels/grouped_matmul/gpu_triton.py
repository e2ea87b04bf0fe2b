"""The gradient of the weights by Pallas's Triton backend; products of rows are `quantized_matmul/gpu_triton.py`'s.

A program has a tile of one group's gradient and goes through the group's rows. Rows of others are zeroed on both sides:
they may hold anything.

Shapes: N rows, E groups, I inputs, O outputs; n, o, i: what a tile has of them.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu


def dweight(x_NI: jax.Array, dy_NO: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """`dy.T @ x` of each group's rows, [E, O, I]."""
    (N, I), O, E, dtype = x_NI.shape, dy_NO.shape[1], len(sizes_E), x_NI.dtype
    if not N:
        return jnp.zeros((E, O, I), dtype)
    wide = dtype.itemsize == 4
    n, o, i = (16, 64, 64) if wide else (64, min(128, _tile(O)), min(128, _tile(I)))
    columns = pl.cdiv(I, i)

    def kernel(x: Any, dy: Any, sizes: Any, out: Any) -> None:
        group = pl.program_id(1)
        nth = pl.program_id(0)
        e = jnp.arange(pl.next_power_of_2(E), dtype=jnp.int32)
        size_e = plgpu.load(sizes.at[jnp.minimum(e, E - 1)])
        first = jnp.sum(jnp.where(e < group, size_e, 0))
        end = first + jnp.sum(jnp.where(e == group, size_e, 0))
        own_o = lax.div(nth, jnp.int32(columns)) * o + jnp.arange(o, dtype=jnp.int32)
        own_i = lax.rem(nth, jnp.int32(columns)) * i + jnp.arange(i, dtype=jnp.int32)

        def load(ref: Any, own: jax.Array, length: int, row: jax.Array) -> jax.Array:
            # Beyond the array's width is what is not stored.
            own = own if length % len(own) == 0 else jnp.minimum(own, length - 1)
            mask = jnp.broadcast_to((row < end)[:, None], (n, len(own)))
            return plgpu.load(ref.at[row[:, None], own[None]], mask=mask, other=jnp.zeros((), ref.dtype))

        def step(s: Any, sums_oi: jax.Array) -> jax.Array:
            row_n = first + s * n + jnp.arange(n, dtype=jnp.int32)
            dy_no, x_ni = load(dy, own_o, O, row_n), load(x, own_i, I, row_n)
            precision = lax.Precision.HIGHEST if wide else lax.Precision.DEFAULT
            dims = (((0,), (0,)), ((), ()))
            return sums_oi + lax.dot_general(dy_no, x_ni, dims, precision=precision, preferred_element_type=jnp.float32)

        steps = lax.div(end - first + (n - 1), jnp.int32(n))
        sums_oi = lax.fori_loop(0, steps, step, jnp.zeros((o, i), jnp.float32))
        kept = (own_o < O)[:, None] & (own_i < I)[None]
        plgpu.store(out.at[group, own_o[:, None], own_i[None]], sums_oi.astype(dtype), mask=kept)

    return pl.pallas_call(
        kernel,
        grid=(pl.cdiv(O, o) * columns, E),
        out_shape=jax.ShapeDtypeStruct((E, O, I), dtype),
        compiler_params=plgpu.CompilerParams(num_warps=8 if o * i >= 128 * 128 else 4, num_stages=3),
        name="grouped_matmul_dweight",
    )(x_NI, dy_NO, sizes_E)


def _tile(size: int) -> int:
    return max(16, pl.next_power_of_2(size))

"""Activations as a TPU's matrix unit takes them against 8-bit weights: each number in pieces.

A unit that multiplies int8 by int8 needs no float copy of the weights. A row times the power of two that brings its
largest number near 2 ** 22 is whole numbers, up to half a unit, and three int8 digits to the base 256 hold them; sums
of their products are exact integers. float8 weights meet bfloat16, of which three pieces hold a float32.

Shapes: M rows   I inputs   T inputs of a tile   J blocks of inputs in a tile
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

# Inputs that one product puts in order.
SHUFFLED = 128


@dataclass(frozen=True)
class Operand:
    """What the matrix unit multiplies: the dtype, and what each piece of the activations counts for."""

    dtype: jnp.dtype
    weights: tuple[float, ...]

    @property
    def pieces(self) -> int:
        return len(self.weights)

    @property
    def sums(self) -> jnp.dtype:
        return jnp.dtype(jnp.int32 if self.dtype == jnp.int8 else jnp.float32)


def operand(dtype: jnp.dtype, x_dtype: jnp.dtype) -> Operand:
    """`dtype`'s pieces for activations of `x_dtype` that are not quantised."""
    if dtype == jnp.int8:
        return Operand(jnp.dtype(jnp.int8), (65536.0, 256.0, 1.0))
    return Operand(jnp.dtype(jnp.bfloat16), (1.0,) * (1 if x_dtype == jnp.bfloat16 else 3))


def split(x_MI: jax.Array, taken: Operand) -> tuple[list[jax.Array], jax.Array]:
    """The pieces of x, each [M, I], and the scales [M, 1] of their weighted sum; nan for a row that is not finite."""
    x_MI = x_MI.astype(jnp.float32)
    if taken.dtype == jnp.bfloat16:
        pieces = []
        for _ in taken.weights:
            # Not what an infinity leaves, which is no number: inf comes out as inf.
            pieces.append(x_MI.astype(jnp.bfloat16))
            x_MI = jnp.where(jnp.isfinite(x_MI), x_MI - pieces[-1].astype(jnp.float32), 0)
        return pieces, jnp.ones((len(x_MI), 1), jnp.float32)
    reach_M1 = jnp.max(jnp.abs(x_MI), axis=1, keepdims=True)
    # The power of two above it, from the bits, where its reciprocal is a normal number.
    above_M1 = (lax.bitcast_convert_type(reach_M1, jnp.int32) >> 23) - 126
    up_M1 = 22 - jnp.clip(above_M1, -100, 128)
    scaled = x_MI * lax.bitcast_convert_type((up_M1 + 127) << 23, jnp.float32)
    down_M1 = lax.bitcast_convert_type((127 - up_M1) << 23, jnp.float32)
    scales_M1 = jnp.where(jnp.isfinite(reach_M1), down_M1, jnp.nan)
    pieces = []
    rest = jnp.where(jnp.isfinite(reach_M1), jnp.round(scaled), 0).astype(jnp.int32)
    for _ in range(2):
        digit = ((rest + 128) & 255) - 128
        pieces.insert(0, digit.astype(jnp.int8))
        rest = (rest - digit) >> 8
    return [rest.astype(jnp.int8), *pieces], scales_M1


def apart(x_RI: jax.Array, tile: int, block: int, paired: bool) -> jax.Array:
    """Rows [R, I] as rows [J * R, I], where row group j keeps only block j of each tile of inputs and has zeros else.

    So one product of a tile's depth gives the sums of its J blocks, each for itself. `paired`: the rows are as
    `evens_first` left them.
    """
    R, I = x_RI.shape
    x_RNT = x_RI.reshape(R, I // tile, tile)
    members = jnp.arange(tile) // block
    if paired:
        members = jnp.concatenate([members[::2], members[1::2]])
    groups = -(-tile // block)
    keep_JT = members == jnp.arange(groups)[:, None]
    x_JRNT = jnp.where(keep_JT[:, None, None], x_RNT, jnp.zeros((), x_RNT.dtype)) if groups > 1 else x_RNT[None]
    return x_JRNT.reshape(groups * R, I)


def evens_first(x_MI: jax.Array, tile: int) -> jax.Array:
    """Within each tile of inputs the even ones before the odd ones, as packed weights leave their bytes.

    By a product, which is exact (one term is not zero) and far faster than a TPU picks every second lane. Inf makes its
    row nan.
    """
    M, I = x_MI.shape
    small, dtype = SHUFFLED, x_MI.dtype
    x_XT = x_MI.reshape(-1, small).astype(jnp.bfloat16 if dtype in (jnp.int8, jnp.bfloat16) else jnp.float32)
    order = jnp.concatenate([jnp.arange(0, small, 2), jnp.arange(1, small, 2)])
    permutation_TT = (jnp.arange(small)[:, None] == order).astype(x_XT.dtype)
    turned_XT = jnp.dot(x_XT, permutation_TT, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
    halves = turned_XT.astype(dtype).reshape(M, I // tile, tile // small, 2, small // 2).swapaxes(2, 3)
    return halves.reshape(M, I)

"""quantized_matmul by XLA's own products.

A CPU multiplies float32: weights become floats some hundred outputs at a time, in a buffer that stays in its cache, and
are never whole in memory. int8 activations with one scale a row are its fast quantised path, from four rows on: fewer
are filled up.

Shapes: M rows   I inputs   H = I / 2   O outputs   C outputs at a time   G blocks of inputs   B inputs of a block
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from ..chips import known_platform
from .activations import finish
from .formats import FLOAT8, PACKED, QuantizedWeight, dequantize, expand, from_e2m1, scales_of, values_of
from .quantize_rows import quantize_rows

# Floats of weights at a time: half a megabyte.
CHUNK = 1 << 17
FAST_ROWS = 4
Parts = list[tuple[jax.Array, jax.Array]]


def quantized_matmul(
    x_MI: jax.Array,
    weight: QuantizedWeight,
    bias_O: jax.Array | None,
    scale: jax.Array | None,
    *,
    activation: str | None,
    activation_format: str | None,
    out_dtype: jnp.dtype,
) -> jax.Array:
    wide = jnp.promote_types(x_MI.dtype, jnp.float32)
    on_cpu = known_platform() == "cpu"
    if activation_format is not None:
        x_MGB, scales_MG = quantize_rows(x_MI, activation_format, weight.block_sizes[1], scale)
        if x_MGB.shape[1] == 1 or not on_cpu:
            sums_MO = _products_of_blocks(x_MGB, scales_MG, weight, wide)
            return finish(sums_MO, bias_O, activation, out_dtype)
        x_MI = (x_MGB.astype(wide) * scales_MG[..., None].astype(wide)).reshape(len(x_MI), -1)[:, : x_MI.shape[1]]
    if on_cpu:
        sums_MO = _in_chunks(x_MI.astype(wide), weight)
    elif weight.scales.shape[0] == 1:
        # Every format's values are exact in bfloat16: the scales are left for the sums.
        sums_MO = _dot(x_MI, values_of(weight).astype(x_MI.dtype), (1, 1), wide)
        sums_MO = _scaled(sums_MO, jnp.sum(x_MI, axis=1, dtype=wide), weight)
    else:
        sums_MO = _dot(x_MI, dequantize(weight, wide).astype(x_MI.dtype), (1, 1), wide)
    return finish(sums_MO, bias_O, activation, out_dtype)


def quantized_matmul_transposed(dy_MO: jax.Array, weight: QuantizedWeight, *, out_dtype: jnp.dtype) -> jax.Array:
    wide = jnp.promote_types(dy_MO.dtype, jnp.float32)
    if known_platform() != "cpu":
        return _dot(dy_MO, dequantize(weight, wide).astype(dy_MO.dtype), (1, 0), wide).astype(out_dtype)
    dy_MO, (M, O), I = dy_MO.astype(wide), dy_MO.shape, weight.shape[1]
    shares = 2 if weight.format in PACKED else 1
    offset_M1 = jnp.zeros((), wide)
    if weight.scales.shape[0] == 1:
        # What is left for the sums of the forward product comes first here.
        dy_MO = dy_MO * _by_output(scales_of(weight.scales, wide), weight)
        if weight.zeros is not None:
            offset_M1 = jnp.sum(dy_MO * _by_output(weight.zeros.astype(wide), weight), axis=1, keepdims=True)

    def add(start: jax.Array, size: int, sums: list[jax.Array]) -> list[jax.Array]:
        dy_MC = lax.dynamic_slice_in_dim(dy_MO, start, size, 1)
        # Outputs are the rows of whole bytes' values, and the columns of packed ones.
        along = 1 if shares == 2 else 0
        parts = _floats(weight, start, size, wide)
        return [total + _dot(dy_MC, w, (1, along), wide) for total, w in zip(sums, parts, strict=True)]

    sums = _over_outputs(add, O, I, [jnp.zeros((M, I // shares), wide)] * shares)
    return (jnp.stack(sums, axis=2).reshape(M, I) - offset_M1).astype(out_dtype)


def _in_chunks(x_MI: jax.Array, weight: QuantizedWeight) -> jax.Array:
    """float32 products with a few outputs' weights at a time."""
    (M, I), O, wide = x_MI.shape, weight.shape[0], x_MI.dtype
    packed = weight.format in PACKED
    lefts = [x_MI[:, ::2], x_MI[:, 1::2]] if packed else [x_MI]

    def write(start: jax.Array, size: int, y_MO: jax.Array) -> jax.Array:
        rights = _floats(weight, start, size, wide)
        y_MC = sum(_dot(x, w, (1, 0 if packed else 1), wide) for x, w in zip(lefts, rights, strict=True))
        return lax.dynamic_update_slice_in_dim(y_MO, y_MC, start, 1)

    y_MO = _over_outputs(write, O, I, jnp.zeros((M, O), wide))
    return _scaled(y_MO, jnp.sum(x_MI, axis=1), weight) if weight.scales.shape[0] == 1 else y_MO


def _over_outputs(step: Callable, O: int, I: int, state):
    """`state` after `step(start, size, state)` for all chunks of outputs, the rest last."""
    size = max(8, CHUNK // I // 8 * 8)
    whole = O // size
    if whole:
        state = lax.fori_loop(0, whole, lambda chunk, state: step(chunk * size, size, state), state)
    return step(jnp.int32(whole * size), O - whole * size, state) if O % size else state


def _floats(weight: QuantizedWeight, start: jax.Array, size: int, wide: jnp.dtype) -> list[jax.Array]:
    """Some outputs' weights as floats, [C, I], or of packed ones [H, C] for even and for odd inputs.

    With one block of inputs, scale and zero point are left for the sums.
    """
    packed, I = weight.format in PACKED, weight.shape[1]
    outputs = 1 if packed or weight.inputs_first else 0
    part = lax.dynamic_slice_in_dim(weight.values, start, size, outputs)
    part = part.T if weight.inputs_first else part
    codes = [part & 15, part >> 4] if packed else [part]
    if weight.format == "mxfp4":
        values = [from_e2m1(code).astype(wide) for code in codes]
    else:
        values = [code.astype(wide) - (8 if packed else 0) for code in codes]
    if weight.scales.shape[0] == 1:
        return values

    def by_element(blocks_GP: jax.Array, first: int) -> jax.Array:
        blocks_GO = _by_output(blocks_GP, weight)
        blocks_GC = lax.dynamic_slice_in_dim(blocks_GO, start, size, 1) if blocks_GO.shape[1] > 1 else blocks_GO
        elements_IC = jnp.repeat(blocks_GC, weight.block_sizes[1], axis=0)[:I]
        return elements_IC[first::2] if packed else elements_IC.T

    for first, value in enumerate(values):
        if weight.zeros is not None:
            value = value - by_element(weight.zeros.astype(wide), first)
        values[first] = value * by_element(scales_of(weight.scales, wide), first)
    return values


def _products_of_blocks(
    x_MGB: jax.Array, x_scales_MG: jax.Array, weight: QuantizedWeight, wide: jnp.dtype
) -> jax.Array:
    """Sums of quantised activations times quantised weights, each block of inputs exact before it is scaled."""
    (M, G, B), (O, I) = x_MGB.shape, weight.shape
    values_OI = values_of(weight)
    if values_OI.dtype == FLOAT8:
        exact, narrow = jnp.float32, jnp.float32 if known_platform() == "cpu" else jnp.bfloat16
    else:
        exact, narrow = jnp.int32, jnp.int8
    if G == 1:
        x_MI = jnp.pad(x_MGB[:, 0].astype(narrow), [(0, max(0, FAST_ROWS - M)), (0, 0)])
        products_MO = _dot(x_MI, values_OI.astype(narrow), (1, 1), exact)[:M]
        totals_M = jnp.sum(x_MGB[:, 0], axis=1, dtype=exact).astype(wide)
        return _scaled(products_MO.astype(wide), totals_M, weight) * x_scales_MG.astype(wide)
    w_OGB = jnp.pad(values_OI.astype(narrow), [(0, 0), (0, G * B - I)]).reshape(O, G, B)
    products_GMO = jnp.einsum("mgb,ogb->gmo", x_MGB.astype(narrow), w_OGB, preferred_element_type=exact).astype(wide)
    if weight.zeros is not None:
        totals_MG = jnp.sum(x_MGB, axis=2, dtype=exact).astype(wide)
        products_GMO -= totals_MG.T[..., None] * _by_output(weight.zeros.astype(wide), weight)[:, None]
    scales_GO = _by_output(scales_of(weight.scales, wide), weight)
    return jnp.sum(products_GMO * x_scales_MG.astype(wide).T[..., None] * scales_GO[:, None], axis=0)


def _scaled(sums_MO: jax.Array, totals_M: jax.Array, weight: QuantizedWeight) -> jax.Array:
    """Sums with the bare values, to sums with the weights: one block of inputs, whose activations' sums are given."""
    if weight.zeros is not None:
        sums_MO = sums_MO - totals_M[:, None] * _by_output(weight.zeros.astype(sums_MO.dtype), weight)
    return sums_MO * _by_output(scales_of(weight.scales, sums_MO.dtype), weight)


def _by_output(blocks_GP: jax.Array, weight: QuantizedWeight) -> jax.Array:
    """[G, P] to [G, O], or [G, 1] where all outputs share."""
    return expand(blocks_GP, (weight.block[0], 1), (weight.shape[0], blocks_GP.shape[0])).T


def _dot(left: jax.Array, right: jax.Array, contract: tuple[int, int], sums: jnp.dtype) -> jax.Array:
    floats = jnp.issubdtype(left.dtype, jnp.floating) and left.dtype.itemsize >= 4
    precision = lax.Precision.HIGHEST if floats else lax.Precision.DEFAULT
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(left, right, dimensions, precision=precision, preferred_element_type=sums)

"""What quantized_matmul means: the weight as floats, or integer sums, in the widest dtype at hand."""

import jax
import jax.numpy as jnp
from jax import lax

from .activations import finish
from .formats import FLOAT8, QuantizedWeight, dequantize, expand, scales_of, values_of
from .quantize_rows import quantize_rows


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
    if activation_format is None:
        w_OI = dequantize(weight, wide)
        sums_MO = jnp.einsum("mi,oi->mo", x_MI.astype(wide), w_OI, precision=lax.Precision.HIGHEST)
        return finish(sums_MO, bias_O, activation, out_dtype)
    O, I = weight.shape
    B = weight.block_sizes[1]
    x_MGB, x_scales_MG = quantize_rows(x_MI, activation_format, B, scale)
    G = x_MGB.shape[1]
    w_OGB = jnp.pad(values_of(weight), [(0, 0), (0, G * B - I)]).reshape(O, G, B)
    # Integers are summed as integers, so that there is nothing to round.
    exact = wide if w_OGB.dtype == FLOAT8 else jnp.int32
    w_scales_OG = jnp.broadcast_to(expand(scales_of(weight.scales, wide), (weight.block[0], 1), (O, G)), (O, G))
    x_MGB, w_OGB = x_MGB.astype(exact), w_OGB.astype(exact)
    products_MGO = jnp.einsum("mgb,ogb->mgo", x_MGB, w_OGB, precision=lax.Precision.HIGHEST).astype(wide)
    if weight.zeros is not None:
        zeros_OG = jnp.broadcast_to(expand(weight.zeros.astype(wide), (weight.block[0], 1), (O, G)), (O, G))
        products_MGO -= x_MGB.sum(2, dtype=exact)[..., None].astype(wide) * zeros_OG.T
    sums_MO = jnp.einsum(
        "mgo,mg,og->mo", products_MGO, x_scales_MG.astype(wide), w_scales_OG, precision=lax.Precision.HIGHEST
    )
    return finish(sums_MO, bias_O, activation, out_dtype)


def quantized_matmul_transposed(dy_MO: jax.Array, weight: QuantizedWeight, *, out_dtype: jnp.dtype) -> jax.Array:
    wide = jnp.promote_types(dy_MO.dtype, jnp.float32)
    w_OI = dequantize(weight, wide)
    return jnp.einsum("mo,oi->mi", dy_MO.astype(wide), w_OI, precision=lax.Precision.HIGHEST).astype(out_dtype)

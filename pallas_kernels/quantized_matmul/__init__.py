"""Products of activations with quantised weights: `activation(x @ weight.T + bias)`, weights read as they are kept.

What it means is in `reference.py`, what a weight is in `formats.py`. Shapes, here and in every candidate:
  M rows   I inputs   O outputs   G blocks of inputs   P blocks of outputs
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from ..candidates import Operation
from .activations import ACTIVATIONS
from .formats import (
    INPUTS_FIRST,
    PACKED,
    QuantizedWeight,
    dequantize,
    from_mxfp4_blocks,
    from_values,
    quantize,
    to_values,
    with_inputs_first,
)

__all__ = [
    "ACTIVATIONS",
    "INPUTS_FIRST",
    "PACKED",
    "QuantizedWeight",
    "dequantize",
    "from_mxfp4_blocks",
    "from_values",
    "quantize",
    "quantized_matmul",
    "quantized_matmul_transposed",
    "to_values",
    "with_inputs_first",
]

OPERATION = Operation(__name__, "quantized_matmul")
TRANSPOSED = Operation(__name__, "quantized_matmul_transposed")
# Which weights a quantised activation meets.
PARTNERS = {"int8": ("int8", "int4"), "fp8": ("fp8_e4m3",)}


def quantized_matmul(
    x: jax.Array,
    weight: QuantizedWeight,
    *,
    bias: jax.Array | None = None,
    activation: str | None = None,
    activation_format: str | None = None,
    activation_scale: jax.Array | float | None = None,
    out_dtype: jnp.dtype | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """`activation(x @ weight.T + bias)`, [..., I] to [..., O], differentiable in `x` and `bias`.

    - Without `activation_format`, x is used as it is: its products with the weights' values accumulate in float32
      (float64 for float64 x) and are scaled there. A kernel may take x as whole multiples of 2 ** -22 of the power of
      two above its row's largest magnitude, and 16-bit x may meet weights that were scaled and rounded to its dtype
      where these have several blocks of inputs.
    - `activation_format="int8"` (weights "int8" or "int4") or `"fp8"` (weights "fp8_e4m3") quantises x first, to the
      nearest, symmetric around zero, with one scale a row and block of inputs (`weight.block[1]`; whole rows where that
      is None). Products of a block of int8 are exact integers, of fp8 float32. `activation_scale`, one number, takes
      the place of all those scales (what is beyond its reach saturates).
    - Bias and activation are applied in float32, then the result is rounded once, to `out_dtype`.
    - Rows don't meet: what is in one (inf, a much larger number) changes no other.
    - Gradients: of x, `dy @ weight` from the dequantised weight, as if x had not been quantised (straight through); of
      the bias, the sum of dy. **The weight gets none**: its values, scales and zero points are constants, and
      differentiating with respect to them gives zeros.

    Args:
      x: floats [..., I]. weight: a quantised [O, I], not stacked. bias: floats [O].
      activation: None, or one of `ACTIVATIONS`: "relu", "silu", "gelu" (exact) or "gelu_tanh".
      out_dtype: a float dtype, that of x when None.
      implementation: a candidate's name, or None for the best one of the platform.

    Raises:
      ValueError: shapes, dtypes or options that break the rules above. NotImplementedError: no candidate takes them.
    """
    x = jnp.asarray(x)
    _check(x, weight, bias, activation, activation_format, activation_scale)
    out_dtype = x.dtype if out_dtype is None else jnp.dtype(out_dtype)
    if not jnp.issubdtype(out_dtype, jnp.floating):
        raise ValueError(f"out_dtype is a float dtype, got {out_dtype}")
    options = {"activation_format": activation_format, "out_dtype": out_dtype, "implementation": implementation}
    if activation_scale is not None:
        activation_scale = jnp.asarray(activation_scale, jnp.float32)
    x_MI = x.reshape(-1, x.shape[-1])
    y_MO: Any = _product(tuple(options.items()), activation, x_MI, weight, bias, activation_scale)
    return y_MO.reshape(*x.shape[:-1], weight.shape[0])


def quantized_matmul_transposed(
    dy: jax.Array,
    weight: QuantizedWeight,
    *,
    out_dtype: jnp.dtype | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """`dy @ weight`, [..., O] to [..., I], with the dequantised weight: the gradient of the inputs.

    Sums are float32 (float64 for float64 dy), the result is rounded to `out_dtype` (that of dy when None). Raises as
    `quantized_matmul`.
    """
    weight.check()
    O = weight.shape[0]
    if weight.values.ndim != 2 or dy.shape[-1] != O or not jnp.issubdtype(dy.dtype, jnp.floating):
        raise ValueError(f"dy is floats [..., {O}] for a weight {list(weight.shape)}, got {dy.dtype}{dy.shape}")
    out_dtype = dy.dtype if out_dtype is None else jnp.dtype(out_dtype)
    dx_MI = TRANSPOSED(dy.reshape(-1, O), weight, out_dtype=out_dtype, implementation=implementation)
    return dx_MI.reshape(*dy.shape[:-1], weight.shape[1])


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(
    options: tuple[tuple[str, Any], ...],
    activation: str | None,
    x_MI: jax.Array,
    weight: QuantizedWeight,
    bias_O: jax.Array | None,
    scale: jax.Array | None,
) -> jax.Array:
    return OPERATION(x_MI, weight, bias_O, scale, activation=activation, **dict(options))


def _forward(options, activation, x_MI, weight, bias_O, scale):
    # An empty slice of x remembers its dtype.
    kept = (x_MI[:0], weight, None if bias_O is None else bias_O[:0])
    if activation is None:
        return _product(options, None, x_MI, weight, bias_O, scale), (*kept, None)
    wide = jnp.promote_types(x_MI.dtype, jnp.float32)
    z_MO = _product((*options, ("out_dtype", wide)), None, x_MI, weight, bias_O, scale)
    return ACTIVATIONS[activation](z_MO).astype(dict(options)["out_dtype"]), (*kept, z_MO)


def _backward(options, activation, kept, dy_MO):
    x_0I, weight, bias_0, z_MO = kept
    dz_MO = dy_MO
    if activation is not None:
        dz_MO = jax.vjp(ACTIVATIONS[activation], z_MO)[1](dy_MO.astype(z_MO.dtype))[0]
    # The next product's speed is that of its left side's dtype.
    wide = jnp.promote_types(x_0I.dtype, jnp.float32)
    dbias_O = None if bias_0 is None else jnp.sum(dz_MO, axis=0, dtype=wide).astype(bias_0.dtype)
    dx_MI = quantized_matmul_transposed(
        dz_MO.astype(x_0I.dtype), weight, implementation=dict(options)["implementation"]
    )
    return dx_MI, None, dbias_O, None


_product.defvjp(_forward, _backward)


def _check(
    x: jax.Array,
    weight: QuantizedWeight,
    bias: jax.Array | None,
    activation: str | None,
    activation_format: str | None,
    activation_scale: Any,
) -> None:
    if not isinstance(weight, QuantizedWeight):
        raise ValueError(f"weight is a QuantizedWeight (see `quantize`), got {type(weight).__name__}")
    weight.check()
    if weight.values.ndim != 2:
        raise ValueError(f"weight is one matrix [O, I], got a stack {weight.shape}: take one, or use vmap or scan")
    O, I = weight.shape
    if x.ndim < 1 or x.shape[-1] != I or not jnp.issubdtype(x.dtype, jnp.floating) or x.dtype.itemsize < 2:
        raise ValueError(f"x is floats [..., {I}] of 16 bits or more for a weight [{O}, {I}], got {x.dtype}{x.shape}")
    if bias is not None and (bias.shape != (O,) or not jnp.issubdtype(bias.dtype, jnp.floating)):
        raise ValueError(f"bias is floats ({O},), got {bias.dtype}{bias.shape}")
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(f"activation is None or one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if activation_format is None:
        if activation_scale is not None:
            raise ValueError("activation_scale is for a quantised x: give activation_format too")
        return
    if activation_format not in PARTNERS:
        raise ValueError(f"activation_format is None or one of {', '.join(PARTNERS)}, got {activation_format!r}")
    if weight.format not in PARTNERS[activation_format]:
        raise ValueError(
            f"{activation_format} activations meet weights {' and '.join(PARTNERS[activation_format])}, "
            f"got {weight.format}"
        )
    if activation_scale is not None and jnp.shape(activation_scale) != ():
        raise ValueError(f"activation_scale is one number, got {jnp.shape(activation_scale)}")

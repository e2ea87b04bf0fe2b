"""Linear layer.

Shapes: I inputs, O outputs.

The weight is kept as [O, I], the layout of Hugging Face files: conversion then moves bytes and nothing else, and a
checkpoint can be memory-mapped. It has a second reason: on XLA:CPU a row of `x @ w.T` has the same bits whatever the
number of rows from two up, which `x @ w` has not, and a server needs that to answer alike at every batch size.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from ..pallas_kernels.chips import known_platform
from ..pallas_kernels.quantized_matmul import QuantizedWeight, dequantize, quantized_matmul
from ..sharding.rules import gather
from .quantization_config import Quantization
from .quantized import quantized_params, quantized_weight

# The name of products of tokens and weights, for what decides which results the backward pass keeps.
PRODUCT = "product"


def matmul_precision(dtype: jnp.dtype) -> lax.Precision:
    """Full precision for float32 and wider (TPUs would round to bfloat16), the native one for narrower types."""
    return lax.Precision.HIGHEST if jnp.dtype(dtype).itemsize >= 4 else lax.Precision.DEFAULT


# A product with fewer is never computed with the weights first: XLA:CPU has other kernels for it, which round a row in
# another way in batches of other sizes.
FEWEST_OUTPUTS = 64
# Of more inputs XLA:CPU cuts the sums in parts when there are fewer rows, which rounds them in another way.
LONGEST_SUM, ROWS_OF_LONG_SUMS = 2048, 16
_weights_first: ContextVar[bool] = ContextVar("weights_first", default=False)


@contextlib.contextmanager
def weights_first(on: bool = True) -> Iterator[None]:
    """Whoever traces within has products with weights computed as `W x^T`, which is then turned.

    XLA:CPU reads the weights as they lie then, where it packs them first otherwise: half the time for eight rows. But
    it may round a row in another way in a batch of another size: whoever asks for it sees to the sizes.
    """
    before = _weights_first.set(on)
    try:
        yield
    finally:
        _weights_first.reset(before)


def product(x: jax.Array, weight_OI: jax.Array, dtype: jnp.dtype | None = None) -> jax.Array:
    """`x @ weight.T`, [..., I] to [..., O], accumulated and returned in `dtype`, by default that of `x`."""
    one_row = x.size == x.shape[-1]
    if one_row and x.ndim > 1 and x.dtype == jnp.bfloat16 and known_platform() == "cpu":
        # XLA:CPU has no quick kernel for one row of it. Two are rounded as any number of them.
        return _einsum("...i,oi->...o", jnp.concatenate([x, x], axis=-2), weight_OI, dtype)[..., :1, :]
    # One row is read the same either way, with less ado.
    if not _weights_first.get() or one_row or len(weight_OI) < FEWEST_OUTPUTS:
        return _einsum("...i,oi->...o", x, weight_OI, dtype)
    # Without the barriers XLA turns the product around again, or has its kernel turn `x`, or who takes the result read
    # it column by column: all slow.
    x_NI = x.reshape(-1, x.shape[-1])
    count = len(x_NI)
    if x.shape[-1] > LONGEST_SUM and count < ROWS_OF_LONG_SUMS:
        x_NI = jnp.pad(x_NI, ((0, ROWS_OF_LONG_SUMS - count), (0, 0)))
    x_IN = lax.optimization_barrier(x_NI.T)
    y_ON = lax.optimization_barrier(_einsum("oi,in->on", weight_OI, x_IN, dtype))
    return lax.optimization_barrier(y_ON[:, :count].T).reshape(*x.shape[:-1], len(weight_OI))


def _einsum(subscripts: str, a: jax.Array, b: jax.Array, dtype: jnp.dtype | None = None) -> jax.Array:
    """A product of two matrices, accumulated and returned in `dtype`, by default that of `a`.

    XLA:CPU has quick kernels for bfloat16 with sums of float32, and for results of bfloat16 a loop, ten times as slow.
    """
    dtype = dtype or a.dtype
    narrow = a.dtype == jnp.bfloat16 and known_platform() == "cpu"
    sums = jnp.promote_types(dtype, jnp.float32) if narrow else dtype
    y = jnp.einsum(subscripts, a, b, precision=matmul_precision(a.dtype), preferred_element_type=sums)
    return y.astype(dtype)


@jax.custom_vjp
def _product(x: jax.Array, weight_OI: jax.Array) -> jax.Array:
    return product(x, weight_OI)


def _product_forward(x: jax.Array, weight_OI: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _product(x, weight_OI), (x, weight_OI)


def _product_backward(kept: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, weight_OI = kept
    dx = _einsum("...o,oi->...i", dy, weight_OI)
    # As x^T dy and not dy^T x: XLA:CPU copies the left side transposed, and fuses all that made dy into that slow copy
    # (15% of a training step). Without the barrier it turns the product around again.
    dweight_IO = _einsum("...i,...o->io", x, dy)
    return dx, jax.lax.optimization_barrier(dweight_IO).T


_product.defvjp(_product_forward, _product_backward)


def linear(x: jax.Array, weight_OI: jax.Array | QuantizedWeight, bias_O: jax.Array | None = None) -> jax.Array:
    """`x @ weight.T + bias` in the dtype of `x`, shape [..., I] to [..., O]. A quantised weight gets no gradient."""
    dtype = x.dtype
    if isinstance(weight_OI, QuantizedWeight):
        return checkpoint_name(quantized_matmul(x, weight_OI, bias=bias_O), PRODUCT)
    y = checkpoint_name(_product(x, weight_OI.astype(dtype)), PRODUCT)
    return y if bias_O is None else y + bias_O.astype(dtype)


class Linear(nnx.Module):
    """`y = x W^T + b`, [..., I] to [..., O], computed in the dtype of the input.

    Args:
        in_features, out_features: I and O.
        axes: the logical names of O and I; None: whole on every device.
        scale: standard deviation of the initial weights times sqrt(I).
        quantization: how the weight is kept, as `values` and `scales`; None: as `weight`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        axes: tuple[str | None, str | None],
        bias: bool = False,
        scale: float = 1.0,
        quantization: Quantization | None = None,
        param_dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        deviation = scale * in_features**-0.5
        draw = jax.random.normal(rngs.params(), (out_features, in_features), param_dtype)
        draw = draw * jnp.asarray(deviation, param_dtype)
        self.quantization = quantization
        if quantization is None:
            self.weight = nnx.Param(draw, axes=axes)
        else:
            self.values, self.scales = quantized_params(draw, quantization, axes)
        self.bias = nnx.Param(jnp.zeros((out_features,), param_dtype), axes=axes[:1]) if bias else None

    def whole_weight(self, dtype: jnp.dtype) -> jax.Array:
        """The weight [O, I] in `dtype`, as a block computes with it. Cast before it is gathered: half the bytes."""
        if self.quantization is not None:
            return dequantize(quantized_weight(self.quantization, self.values, self.scales), dtype)
        return gather(self.weight[...].astype(dtype), self.weight.axes)

    def __call__(self, x: jax.Array) -> jax.Array:
        bias_O = None if self.bias is None else gather(self.bias[...], self.bias.axes)
        if self.quantization is not None:
            return linear(x, quantized_weight(self.quantization, self.values, self.scales), bias_O)
        return linear(x, self.whole_weight(x.dtype), bias_O)

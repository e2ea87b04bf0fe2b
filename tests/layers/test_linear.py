"""A linear layer with a quantised weight in the place of its floats."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from twinax.layers.linear import Linear
from twinax.pallas_kernels.quantized_matmul import dequantize, quantize


def test_a_quantised_weight_takes_the_place_of_an_array():
    layer = Linear(64, 24, axes=("embed", "mlp"), bias=True, rngs=nnx.Rngs(0))
    layer.bias[...] = jnp.arange(24.0)
    floats, x = layer.weight[...], jax.random.normal(jax.random.key(1), (2, 5, 64))
    quantised = quantize(floats, "int4", block=(1, 32))
    layer.weight = nnx.Param(quantised, axes=layer.weight.axes)

    y = nnx.jit(lambda layer, x: layer(x))(layer, x)
    want = np.asarray(x, np.float64) @ np.asarray(dequantize(quantised), np.float64).T + np.arange(24.0)
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)
    assert y.dtype == x.dtype and np.abs(np.asarray(x @ floats.T) + np.arange(24.0) - y).max() > 1e-3

    # The layer is a pytree like any other, and its input has a gradient.
    graph, state = nnx.split(layer)
    dx = jax.grad(lambda x: nnx.merge(graph, state)(x).sum())(x)
    column_sums = np.asarray(dequantize(quantised), np.float64).sum(0)
    np.testing.assert_allclose(dx, np.broadcast_to(column_sums, x.shape), rtol=1e-4, atol=1e-5)

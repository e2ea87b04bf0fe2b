"""A linear layer whose weight is kept quantised."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from twinax.layers.linear import Linear
from twinax.layers.quantization_config import Quantization
from twinax.pallas_kernels.quantized_matmul import QuantizedWeight, dequantize


@pytest.mark.parametrize(("format", "block"), [("mxfp4", (1, 32)), ("fp8_e4m3", (16, 32))])
def test_a_quantised_weight_takes_the_place_of_an_array(format, block):
    axes, kept = ("mlp", "embed"), Quantization(format, block, ("linear",))
    floats = Linear(64, 24, axes=axes, bias=True, rngs=nnx.Rngs(0)).weight[...]
    layer = Linear(64, 24, axes=axes, bias=True, quantization=kept, rngs=nnx.Rngs(0))
    layer.bias[...] = jnp.arange(24.0)
    x = jax.random.normal(jax.random.key(1), (2, 5, 64))
    weight = dequantize(QuantizedWeight(layer.values[...], layer.scales[...], None, format, block))

    y = nnx.jit(lambda layer, x: layer(x))(layer, x)
    want = np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T + np.arange(24.0)
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)
    assert y.dtype == x.dtype and 1e-3 < np.abs(np.asarray(x @ floats.T) + np.arange(24.0) - y).max() < 1

    # The layer is a pytree like any other, and its input has a gradient.
    graph, state = nnx.split(layer)
    dx = jax.grad(lambda x: nnx.merge(graph, state)(x).sum())(x)
    column_sums = np.asarray(weight, np.float64).sum(0)
    np.testing.assert_allclose(dx, np.broadcast_to(column_sums, x.shape), rtol=1e-4, atol=1e-5)

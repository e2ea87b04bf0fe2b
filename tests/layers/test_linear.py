"""Linear layers whose weight is kept quantised, and products of bfloat16."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.quick import full_compile
from twinax.layers.linear import Linear, product
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


@pytest.mark.parametrize(("inputs", "outputs"), [(64, 48), (768, 256), (2304, 96)])
def test_rows_of_bfloat16_are_rounded_alike_whatever_their_number(inputs, outputs):
    shapes = ((72, inputs), (outputs, inputs))
    x, weight = (jax.random.normal(jax.random.key(n), shape, jnp.bfloat16) for n, shape in enumerate(shapes))
    with full_compile():
        every = {n: np.asarray(jax.jit(product)(x[:n], weight), np.float32) for n in (1, 2, 3, 8, 17, 64, 72)}
        sums = np.asarray(jax.jit(lambda x, w: product(x, w, jnp.float32))(x, weight))
    for n, rows in every.items():
        np.testing.assert_array_equal(rows, every[72][:n])
    want = np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T
    np.testing.assert_allclose(sums, want, rtol=1e-5, atol=1e-6 * inputs)
    np.testing.assert_array_equal(every[72], np.asarray(jnp.asarray(sums).astype(jnp.bfloat16), np.float32))

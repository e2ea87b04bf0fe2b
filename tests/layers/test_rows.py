"""A row's numbers are the same bits among few rows and many."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from twinax.layers.moe_config import MoEConfig
from twinax.layers.norm import LayerNorm, RMSNorm
from twinax.layers.router import RouterWeights, route
from twinax.layers.rows import row_mean, row_sum


def rows(width: int, dtype=np.float32) -> np.ndarray:
    return np.random.default_rng(width).standard_normal((136, width)).astype(dtype)


def test_sums_and_means():
    with jax.enable_x64(True):
        x = rows(100, np.float64)
        np.testing.assert_allclose(row_sum(x), x.sum(-1, keepdims=True), rtol=1e-13, atol=1e-13)
        np.testing.assert_allclose(row_mean(x), x.mean(-1, keepdims=True), rtol=1e-13, atol=1e-13)


@pytest.mark.usefixtures("full_compile")
@pytest.mark.parametrize("width", [64, 256, 700])
def test_norms_and_routers_give_a_row_the_same_bits(width):
    x = rows(width)
    routers = [MoEConfig(8, 2, 4, router=router) for router in ("softmax", "sigmoid")]
    weight_ED = jnp.asarray(np.random.default_rng(0).standard_normal((8, width)), jnp.float32)
    wide_ED = jnp.asarray(np.random.default_rng(1).standard_normal((160, width)), jnp.float32)
    functions = [
        RMSNorm(width, epsilon=1e-5),
        LayerNorm(width, epsilon=1e-5),
        *(lambda x, one=one: route(one, x, RouterWeights(weight_ED, None, None)).weight_NK for one in routers),
        lambda x: route(MoEConfig(160, 6, 4), x, RouterWeights(wide_ED, None, None)).weight_NK,
    ]
    for function in functions:
        run = jax.jit(lambda x, f=function: f(x))
        few, many = run(x[:8]), run(x)
        np.testing.assert_array_equal(few, many[:8])

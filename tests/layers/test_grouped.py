"""Grouped products against a loop over rows, in float64, and the bits of a row in any company."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from twinax.layers import grouped
from twinax.layers.grouped import grouped_linear

CASES = {
    "even": [4, 4, 4, 4],
    "uneven, more than a block": [0, 21, 1, 300, 0],
    "one group": [7],
    "all in the last": [0, 0, 0, 40],
    "none": [0, 0, 0],
    "one row": [0, 1],
}


@pytest.mark.parametrize("sizes", CASES.values(), ids=CASES)
def test_values_and_gradients_are_those_of_each_row_with_its_weight(sizes):
    rng = np.random.default_rng(0)
    rest, I, O, G = 5, 6, 3, len(sizes)
    group_N = np.repeat(np.arange(G), sizes)
    N = len(group_N)
    x_NI, dy_NO, weight_GOI = (rng.standard_normal(s) for s in ((N + rest, I), (N + rest, O), (G, O, I)))
    want = np.zeros((N + rest, O)), np.zeros((N + rest, I)), np.zeros((G, O, I))
    for n, g in enumerate(group_N):
        want[0][n] = weight_GOI[g] @ x_NI[n]
        want[1][n] = dy_NO[n] @ weight_GOI[g]
        want[2][g] += np.outer(dy_NO[n], x_NI[n])
    x_NI[N:] = np.nan  # rows of no group hold anything
    with jax.enable_x64(True):
        function = jax.jit(lambda x, w: grouped_linear(x, w, jnp.asarray(sizes, jnp.int32)))
        y_NO, backward = jax.vjp(function, x_NI, weight_GOI)
        got = y_NO, *backward(jnp.asarray(dy_NO))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


def test_ragged_dot_means_the_same():
    """What accelerators run, computed here by XLA's dense product of all groups."""
    rng = np.random.default_rng(1)
    sizes_G = jnp.asarray([5, 0, 15], jnp.int32)
    with jax.enable_x64(True):
        x_NI, weight_GOI = (jnp.asarray(rng.standard_normal(shape)) for shape in ((20, 6), (3, 4, 6)))
        want = grouped_linear(x_NI, weight_GOI, sizes_G)
        np.testing.assert_allclose(grouped._by_ragged_dot(x_NI, weight_GOI, sizes_G, 2), want, rtol=1e-12)
        back = grouped._product(want, weight_GOI, sizes_G, contract=1)
        np.testing.assert_allclose(grouped._by_ragged_dot(want, weight_GOI, sizes_G, 1), back, rtol=1e-12)


def test_bfloat16_weights_get_a_gradient_summed_in_float32():
    rng = np.random.default_rng(2)
    x_NI, dy_NO = (jnp.asarray(rng.standard_normal((600, n)), jnp.bfloat16) for n in (4, 3))
    sizes_G = jnp.asarray([600, 0], jnp.int32)
    weight_GOI = jnp.zeros((2, 3, 4), jnp.bfloat16)
    (got_GOI,) = jax.vjp(lambda w: grouped_linear(x_NI, w, sizes_G), weight_GOI)[1](dy_NO)
    want_OI = np.asarray(dy_NO, np.float64).T @ np.asarray(x_NI, np.float64)
    assert got_GOI.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(got_GOI[0], np.float64), want_OI, rtol=2**-8)


@pytest.mark.parametrize(("I", "O"), [(64, 176), (512, 100), (1408, 512)])
def test_a_row_has_the_same_bits_in_any_company(I, O):
    rng = np.random.default_rng(3)
    function = jax.jit(grouped_linear)
    weight_GOI = rng.standard_normal((4, O, I)).astype(np.float32)
    mine_I = rng.standard_normal(I).astype(np.float32)
    want = None
    for sizes, at in (
        ([0, 0, 1, 0], 0),
        ([0, 0, 2, 0], 1),
        ([3, 1, 12, 0], 15),
        ([3, 1, 12, 0], 9),
        ([0, 0, 40, 24], 33),
        ([50, 3, 130, 800], 60),
        ([50, 3, 130, 800], 182),
        ([500, 0, 500, 0], 777),
    ):
        x_NI = rng.standard_normal((max(16, sum(sizes)), I)).astype(np.float32) * 10
        x_NI[at] = mine_I
        got = np.asarray(function(x_NI, weight_GOI, np.asarray(sizes, np.int32)))[at]
        want = got if want is None else want
        np.testing.assert_array_equal(got, want, err_msg=str(sizes))

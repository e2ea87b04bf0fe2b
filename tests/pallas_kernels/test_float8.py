"""Small numbers made within TPU kernels by their bits: each of them, in interpret mode."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from twinax.pallas_kernels import float8
from twinax.pallas_kernels.float8 import FLOAT8, LEAST, to_bfloat16
from twinax.pallas_kernels.paged_attention.pages import quantise
from twinax.pallas_kernels.quantized_matmul.formats import from_e2m1
from twinax.pallas_kernels.quantized_matmul.tpu_codes import INT8, UNITS, spread


def in_a_kernel(function, x, dtype, outputs=1):
    def kernel(x_ref, *refs):
        for ref, y in zip(refs, jax.tree.leaves(function(x_ref[...])), strict=True):
            ref[...] = y

    shapes = [jax.ShapeDtypeStruct((x.shape[0] * x.dtype.itemsize // jnp.dtype(dtype).itemsize, 128), dtype)] * outputs
    if dtype == jnp.bfloat16:
        shapes = [jax.ShapeDtypeStruct(x.shape, dtype)]
    return pl.pallas_call(kernel, out_shape=shapes, interpret=True)(x)


@pytest.mark.parametrize(("chip", "normal"), [("v5p", True), ("v6e", True), ("v6e", False)])
def test_every_float8_is_itself_in_bfloat16(chip, normal, monkeypatch):
    monkeypatch.setattr(float8, "target_chip", lambda: chip)
    codes = np.arange(256, dtype=np.uint8).repeat(16).reshape(32, 128)
    x = jax.lax.bitcast_convert_type(jnp.asarray(codes), FLOAT8)
    (y,) = in_a_kernel(partial(to_bfloat16, normal=normal), x, jnp.bfloat16)
    x, y = np.asarray(x, np.float32), np.asarray(y, np.float32)
    there = (np.abs(x) >= LEAST) | (x == 0) if normal else ~np.isnan(x)
    assert len(np.unique(x[there])) == 256 - 2 - 1 - (2 * 7 if normal else 0)
    np.testing.assert_array_equal(y[there], x[there])


def test_a_product_in_pieces_is_bfloat16s():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((8, 128)) * 2.0 ** rng.integers(-9, 9, (8, 128)), jnp.bfloat16)
    x = (x * jnp.asarray([[1e20], [1e-20], [0], [1], [1], [1], [1], [1]], jnp.bfloat16)).at[7, 3].set(jnp.inf)
    y = jnp.asarray(rng.standard_normal((128, 128)), FLOAT8)

    def kernel(x_ref, y_ref, out_ref):
        out_ref[...] = float8.product(float8.pieces(x_ref[...]), y_ref[...], (1, 1))

    shape = jax.ShapeDtypeStruct((8, 128), jnp.float32)
    out = np.asarray(pl.pallas_call(kernel, out_shape=shape, interpret=True)(x, y), np.float64)
    assert np.isnan(out[7]).all()
    x, y = np.asarray(x, np.float64)[:7], np.asarray(y, np.float64)
    # What small numbers lose, and float32's rounding of sums.
    close = (2.0**-22 * np.abs(x).max(1) * 128 + 2.0**-20 * np.abs(x).sum(1))[:, None] * np.abs(y).max()
    assert (np.abs(out[:7] - x @ y.T) <= close).all()


def test_pages_hold_no_other_float8():
    x = jnp.concatenate([jnp.geomspace(1e-6, 448, 4096), -jnp.geomspace(1e-6, 448, 4096)])[None, None]
    y, scale = quantise(x, FLOAT8)
    sizes = np.abs(np.asarray(y, np.float64))
    assert float(scale[0, 0]) == 1 and ((sizes >= LEAST) | (sizes == 0)).all()
    error = np.abs(np.asarray(y, np.float64) - np.asarray(x, np.float64))
    assert (error <= np.maximum(np.abs(x) / 16, LEAST / 2)).all()


@pytest.mark.parametrize("dtype", [INT8, FLOAT8])
@pytest.mark.parametrize("form", ["int4", "mxfp4"])
def test_every_pair_of_codes_is_two_numbers(form, dtype):
    bytes_ = np.arange(256, dtype=np.uint8).repeat(16).reshape(32, 128)
    # Four rows of bytes are a row of words.
    words = jnp.asarray(bytes_.reshape(8, 4, 128).swapaxes(1, 2).copy().view(np.int32)[..., 0])
    found = in_a_kernel(lambda x: spread(form, x, dtype), words, dtype, outputs=2)
    numbers = np.asarray(from_e2m1(jnp.arange(16)), np.float64)
    if form == "int4":
        numbers = np.arange(16.0) - (8 if dtype == INT8 else 0)
    for half, codes in zip(found, (bytes_ & 15, bytes_ >> 4), strict=True):
        np.testing.assert_array_equal(np.asarray(half, np.float64) * UNITS[form, dtype], numbers[codes])

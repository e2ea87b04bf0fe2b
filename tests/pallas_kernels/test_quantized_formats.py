"""Quantised weights: rounding, packing, and the formats of files."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from twinax.pallas_kernels.quantized_matmul import (
    QuantizedWeight,
    dequantize,
    from_mxfp4_blocks,
    from_values,
    quantize,
    quantized_matmul,
    quantized_matmul_transposed,
    to_values,
    with_inputs_first,
)

E2M1 = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)


jitted = jax.jit(quantize, static_argnames=("format", "block", "zero_points"))


def weights(*shape):
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize("block", [(None, None), (16, 32)])
@pytest.mark.parametrize("zero_points", [False, True])
@pytest.mark.parametrize(("format", "levels"), [("int8", 254), ("int4", 14)])
def test_integers_are_within_half_a_step(format, levels, zero_points, block):
    w = weights(37, 70) + 2.0 * zero_points
    weight = jitted(w, format, block=block, zero_points=zero_points)
    assert weight.shape == (37, 70)
    rows, columns = weight.block_sizes
    w, floats = np.asarray(w), np.asarray(jax.jit(dequantize)(weight))
    for p in range(0, 37, rows):
        for g in range(0, 70, columns):
            part = w[p : p + rows, g : g + columns]
            near = floats[p : p + rows, g : g + columns]
            reach = max(part.max(), 0) - min(part.min(), 0) if zero_points else 2 * np.abs(part).max()
            # With zero points the ends may be half a step out too, as zero stays exact.
            step = reach / (levels + zero_points)
            assert np.abs(near - part).max() <= step * (0.5 + 0.5 * zero_points) * 1.001


def test_fp8_and_mxfp4_are_the_nearest_floats():
    w = weights(20, 64) * 3
    fp8 = jitted(w, "fp8_e4m3")
    units = np.asarray(w / jnp.abs(w).max(axis=1, keepdims=True) * 448)
    np.testing.assert_array_equal(np.asarray(fp8.values), units.astype(ml_dtypes.float8_e4m3fn))

    codes, exponents, _ = (np.asarray(x) for x in to_values(jitted(w, "mxfp4")))
    w = np.asarray(w)
    for o, g in np.ndindex(20, 2):
        part = np.asarray(w[o, 32 * g : 32 * g + 32])
        scale = 2.0 ** (np.floor(np.log2(np.abs(part).max())) - 2)
        assert int(exponents[o, g]) == np.log2(scale) + 127
        near = E2M1[np.asarray(codes[o, 32 * g : 32 * g + 32])]
        np.testing.assert_array_equal(near, (np.clip(part / scale, -6, 6)).astype(ml_dtypes.float4_e2m1fn))


def test_halves_go_to_the_even_code():
    edges = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0]
    w = jnp.asarray([[*edges, *(-x for x in edges), *[0.0] * 16]], jnp.float32)
    want = [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0]
    np.testing.assert_array_equal(dequantize(quantize(w, "mxfp4"))[0, :16], [*want, *(-x for x in want)])


@pytest.mark.parametrize("format", ["int8", "int4", "fp8_e4m3", "mxfp4"])
def test_zeros_and_huge_blocks_are_exact_or_finite(format):
    w = jnp.zeros((4, 64)).at[1].set(1e38).at[2, 5].set(1e-38)
    near = dequantize(jitted(w, format))
    assert np.isfinite(np.asarray(near)).all() and not np.asarray(near[0]).any() and not np.asarray(near[3]).any()
    np.testing.assert_allclose(near[1], 1e38, rtol=0.3)


@pytest.mark.parametrize(("format", "zeros"), [("int8", True), ("int4", True), ("fp8_e4m3", False), ("mxfp4", False)])
def test_values_there_and_back_and_stacks(format, zeros):
    block = (1, 32)
    weight = jitted(weights(3, 20, 64), format, block=block, zero_points=zeros)
    assert weight.shape == (3, 20, 64)
    again = from_values(*to_values(weight), format=format, block=block)
    jax.tree.map(np.testing.assert_array_equal, again, weight)
    one = jax.tree.map(lambda x: x[1], weight)
    alone = jitted(weights(3, 20, 64)[1], format, block=block, zero_points=zeros)
    jax.tree.map(np.testing.assert_array_equal, one, alone)
    if format in ("int4", "mxfp4"):
        assert weight.values.nbytes == weight.values.size == 3 * 20 * 64 // 2


def test_gpt_oss_blocks():
    """Bytes as in its files: of the two inputs of a byte, the first is in the low bits."""
    rng = np.random.default_rng(1)
    blocks = rng.integers(0, 256, (5, 3, 16), dtype=np.uint8)
    scales = rng.integers(120, 134, (5, 3), dtype=np.uint8)
    want = np.stack([E2M1[blocks & 15], E2M1[blocks >> 4]], axis=-1).reshape(5, 3, 32) * 2.0 ** (
        scales[..., None] - 127.0
    )
    weight = from_mxfp4_blocks(jnp.asarray(blocks), jnp.asarray(scales))
    np.testing.assert_array_equal(dequantize(weight), want.reshape(5, 96))


def test_errors_state_the_rule():
    w = weights(4, 64)
    for words, call in {
        "one of int8, int4": lambda: quantize(w, "int2"),
        "I must be even": lambda: quantize(w[:, :63], "int4"),
        r"mxfp4 has blocks \(1, 32\)": lambda: quantize(w, "mxfp4", block=(1, 16)),
        "two positive numbers": lambda: quantize(w, "int8", block=(1, 0)),
        "only int8 and int4 weights have zero points": lambda: quantize(w, "fp8_e4m3", zero_points=True),
        "to quantise is floats": lambda: quantize(w.astype(jnp.int32), "int8"),
        r"in blocks \(1, 32\) are floats \(2, 4\)": lambda: from_values(
            jnp.zeros((4, 64), jnp.int8), jnp.ones((4, 1)), format="int8", block=(1, 32)
        ),
        "values of an int8 weight are int8": lambda: QuantizedWeight(w, w, None, "int8", (1, None)).check(),
    }.items():
        with pytest.raises(ValueError, match=words):
            call()


@pytest.mark.parametrize("format", ["int8", "fp8_e4m3"])
def test_inputs_first_mean_the_same(format):
    weight = jitted(weights(2, 20, 64), format, block=(1, 32))
    turned = with_inputs_first(weight)
    assert turned.shape == weight.shape and turned.values.shape == (2, 64, 20)
    np.testing.assert_array_equal(dequantize(turned), dequantize(weight))
    one, dy = jax.tree.map(lambda a: a[1], (weight, turned)), jnp.ones((3, 20))
    for x, product in ((jnp.ones((3, 64)), quantized_matmul), (dy, quantized_matmul_transposed)):
        first, second = (product(x, w, implementation="xla") for w in one)
        np.testing.assert_array_equal(first, second)


def test_packed_values_have_one_order():
    weight = jitted(weights(1, 4, 64)[0], "int4", block=(1, 32))
    assert with_inputs_first(weight) is weight
    with pytest.raises(ValueError, match="int4 weights have one order"):
        replace(weight, inputs_first=True).check()

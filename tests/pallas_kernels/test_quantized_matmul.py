"""The contract of quantized_matmul, for every candidate.

The reference is held against numpy loops over the docstring's words; every other candidate against the reference in
float64, within what the dtypes of a sum's terms allow.
"""

from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from twinax.pallas_kernels.quantized_matmul import (
    ACTIVATIONS,
    OPERATION,
    TRANSPOSED,
    dequantize,
    quantize,
    quantized_matmul,
    quantized_matmul_transposed,
)

SLOW = pytest.mark.slow
# test_quantized_matmul_gpu.py runs "gpu".
CANDIDATES = [name for name in OPERATION.names() if name not in ("reference", "gpu")]
ALL = pytest.mark.parametrize("implementation", CANDIDATES)
F32, BF16 = "float32", "bfloat16"

# M, I, O, format, block, zero points, activation format, dtype of x, activation. Every format with every kind of block,
# rows that fill no tile, inputs and outputs that fill no block.
CASES = {
    "int8, a channel": (3, 70, 45, "int8", (1, None), False, None, F32, None),
    "int8, one scale, zero point": (1, 33, 20, "int8", (None, None), True, None, BF16, "silu"),
    "int8, groups with a rest": (17, 150, 40, "int8", (1, 32), True, None, F32, "gelu"),
    "int8 x int8": (3, 100, 40, "int8", (1, None), False, "int8", BF16, "relu"),
    "int8 x int8, one scale": (17, 64, 130, "int8", (None, None), True, "int8", F32, None),
    "int8 x int8, groups": (5, 150, 24, "int8", (1, 64), True, "int8", F32, None),
    "int4, a channel": (1, 72, 40, "int4", (1, None), False, None, F32, "gelu_tanh"),
    "int4, groups of 32": (3, 96, 33, "int4", (1, 32), True, None, BF16, None),
    "int4, groups of 128 with a rest": (17, 300, 130, "int4", (1, 128), False, None, F32, None),
    "int4 x int8": (3, 128, 40, "int4", (1, None), True, "int8", F32, None),
    "int4 x int8, groups": (2, 256, 40, "int4", (1, 64), True, "int8", BF16, None),
    "fp8, a channel": (3, 70, 45, "fp8_e4m3", (1, None), False, None, BF16, None),
    "fp8, blocks": (2, 200, 140, "fp8_e4m3", (128, 128), False, None, F32, None),
    "fp8 x fp8": (17, 70, 45, "fp8_e4m3", (None, None), False, "fp8", F32, None),
    "fp8 x fp8, blocks": (3, 200, 140, "fp8_e4m3", (128, 128), False, "fp8", BF16, "silu"),
    "mxfp4": (3, 96, 40, "mxfp4", (1, 32), False, None, BF16, None),
    "mxfp4 with a rest": (1, 74, 130, "mxfp4", (1, 32), False, None, F32, None),
    "fp8, a part of a block": (3, 70, 45, "fp8_e4m3", (128, 128), False, None, BF16, None),
    "fp8 x fp8, a part of a block": (3, 70, 45, "fp8_e4m3", (128, 128), False, "fp8", F32, None),
    "int4, a channel, zero points": (5, 200, 40, "int4", (1, None), True, None, BF16, "silu"),
}


# What runs quickly.
QUICK = ("int8, a channel", "int4, groups of 32", "fp8 x fp8, blocks", "mxfp4 with a rest")
BY_XLA = (
    *QUICK,
    "fp8 x fp8, a part of a block",
    "int8, groups with a rest",
    "int8 x int8, one scale",
    "int4 x int8, groups",
    "int4, a channel",
)


def pairs(by_xla):
    """Cases and candidates, those that take long marked."""
    quick = {"xla": by_xla}
    return pytest.mark.parametrize(
        ("case", "implementation"),
        [
            pytest.param(case, name, marks=() if case in quick.get(name, QUICK) else SLOW)
            for case in CASES
            for name in CANDIDATES
        ],
    )


# One program each: their operations would be compiled one by one.
floats = jax.jit(dequantize)


@partial(jax.jit, static_argnums=(1, 2, 3))
def quantized(w, format, block, zero_points):
    return quantize(w, format, block=block, zero_points=zero_points)


def make(case):
    """x in float64 but with its dtype's values, the weight, the bias, and the options."""
    M, I, O, format, block, zeros, activation_format, dtype, activation = CASES[case]
    rng = np.random.default_rng(list(CASES).index(case))
    w = rng.standard_normal((O, I)) + 0.5 * zeros
    w[O // 3] = 0
    weight = quantized(jnp.asarray(w, jnp.float32), format, block, zeros)
    x = jnp.asarray(rng.standard_normal((M, I)) * np.geomspace(1, 30, M)[:, None], dtype)
    if M > 2:
        x = x.at[1].set(0)
    bias = jnp.asarray(rng.standard_normal(O), jnp.float32)
    return x, weight, bias, {"activation": activation, "activation_format": activation_format}


def run(function, implementation, *arguments, **options):
    """Compiled, and in interpret mode if it is a TPU's."""
    with pltpu.force_tpu_interpret_mode() if implementation == "tpu" else nullcontext():
        return jax.jit(lambda arguments: function(*arguments, implementation=implementation, **options))(arguments)


def exact(function, *arguments, **options):
    """The reference in float64, in numpy."""
    with jax.enable_x64(True):
        wide, *others = (jnp.asarray(np.asarray(x, np.float64)) if isinstance(x, jax.Array) else x for x in arguments)
        compiled = jax.jit(lambda arguments: function(*arguments, implementation="reference", **options))
        return np.asarray(compiled((wide, *others)))


def product(x, weight, bias, **options):
    return quantized_matmul(x, weight, bias=bias, **options)


def tolerance(x_MI, weight, z_MO, y_MO, dtype):
    """What rounding allows: x to 2 ** -23 of its row's largest, float32 sums of the terms as stored, an activation's
    float32 arithmetic with its argument z, and the result's rounding. No activation is steeper than 1.13.
    """
    zero = offsets(weight)
    size_OI = np.abs(np.asarray(floats(weight), np.float64)) + zero
    reach_M1 = np.abs(np.asarray(x_MI, np.float64)).max(axis=1, keepdims=True)
    rounding = 2.0**-8 if dtype == jnp.bfloat16 else 2.0**-23
    # 16-bit rows may meet weights that were scaled and rounded.
    rounded = 2.0**-8 * np.abs(np.asarray(x_MI, np.float64)) @ size_OI.T
    rounded = rounded if dtype == jnp.bfloat16 and weight.scales.shape[0] > 1 else 0
    return (
        rounded + 1.2 * (2.0**-22 * reach_M1 * size_OI.sum(axis=1) + 2.0**-22 * np.abs(z_MO)) + rounding * np.abs(y_MO)
    )


def offsets(weight):
    """The size of what may be subtracted from a sum instead of from its terms: zero points, int4's eight."""
    if weight.format not in ("int8", "int4"):
        return 0
    nothing = replace(weight, values=np.full_like(weight.values, 0x88 if weight.format == "int4" else 0))
    eight = replace(weight, values=np.zeros_like(weight.values), zeros=None)
    return 2 * sum(np.abs(np.asarray(floats(part), np.float64)) for part in (nothing, eight))


def by_hand(x, weight, bias, activation_format):
    """Loops over the words of the docstrings, without activation."""
    (O, I), (rows, columns) = weight.shape, weight.block_sizes
    stored, scales = np.asarray(weight.values), np.asarray(weight.scales)
    zeros = np.zeros(scales.shape) if weight.zeros is None else np.asarray(weight.zeros)
    magnitudes = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    w, s = np.zeros((O, I)), np.zeros((O, I))
    for o, i in np.ndindex(O, I):
        if weight.format in ("int4", "mxfp4"):
            code = int(stored[i // 2, o]) >> (4 * (i % 2)) & 15
            w[o, i] = code - 8 if weight.format == "int4" else magnitudes[code % 8] * (-1 if code > 7 else 1)
        else:
            w[o, i] = float(stored[o, i])
        g, p = i // columns, o // rows
        w[o, i] -= float(zeros[g, p])
        s[o, i] = 2.0 ** (int(scales[g, p]) - 127) if weight.format == "mxfp4" else float(scales[g, p])
    x = np.asarray(x, np.float64)
    if activation_format is not None:
        for m in range(len(x)):
            for first in range(0, I, columns):
                part = x[m, first : first + columns]
                largest = 127.0 if activation_format == "int8" else 448.0
                scale = float(np.float32(np.abs(part).max()) * np.float32(1 / largest)) or 1.0
                units = np.float32(part) / np.float32(scale)
                units = np.rint(units) if largest == 127.0 else units.astype(jnp.float8_e4m3fn)
                x[m, first : first + columns] = units.astype(np.float64) * scale
    return x @ (w * s).T + np.asarray(bias, np.float64)


@pytest.mark.parametrize("case", [pytest.param(case, marks=() if case in QUICK else SLOW) for case in CASES])
def test_reference_is_what_the_words_say(case):
    x, weight, bias, options = make(case)
    activation_format = options["activation_format"]
    # float32 whatever the case: bfloat16 often has half of a row's largest, 63.5 of 127, and that tie falls either way.
    x = x.astype(F32) * jnp.asarray(np.random.default_rng(5).uniform(0.5, 1, x.shape), F32)
    y = exact(product, x, weight, bias, activation_format=activation_format)
    # Scales of activations are float32.
    close = {"rtol": 1e-10, "atol": 1e-10} if activation_format is None else {"rtol": 2.0**-20, "atol": 2.0**-20}
    np.testing.assert_allclose(y, by_hand(x, weight, bias, activation_format), **close)


@pairs(BY_XLA)
def test_is_the_reference(case, implementation):
    x, weight, bias, options = make(case)
    check(x, weight, bias, options, run(product, implementation, x, weight, bias, **options))


def check(x, weight, bias, options, y):
    """Holds y against the reference."""
    z = exact(product, x, weight, bias, **{**options, "activation": None})
    with jax.enable_x64(True):
        want = z if options["activation"] is None else np.asarray(ACTIVATIONS[options["activation"]](z))
    assert y.dtype == x.dtype and y.shape == want.shape
    share = np.abs(np.asarray(y, np.float64) - want) / tolerance(x, weight, z, want, x.dtype)
    assert share.max() <= 1


@pytest.mark.parametrize("implementation", [name for name in CANDIDATES if name != "tpu"])  # there it is XLA's
@pytest.mark.parametrize("case", [pytest.param(case, marks=() if case in QUICK else SLOW) for case in CASES])
def test_transposed_is_the_reference(case, implementation):
    x, weight, _, _ = make(case)
    dy = jnp.asarray(np.random.default_rng(1).standard_normal((len(x), weight.shape[0])), x.dtype)
    dx = run(quantized_matmul_transposed, implementation, dy, weight)
    want = exact(quantized_matmul_transposed, dy, weight)
    zero = offsets(weight)
    size_OI = np.abs(np.asarray(floats(weight), np.float64)) + zero
    rounding = 2.0**-8 if x.dtype == jnp.bfloat16 else 2.0**-22
    # The dequantised weight may be rounded to the dtype of dy.
    room = rounding * np.abs(np.asarray(dy, np.float64)) @ size_OI + rounding * np.abs(want)
    assert dx.dtype == x.dtype and dx.shape == x.shape
    assert (np.abs(np.asarray(dx, np.float64) - want) <= room).all()


@ALL
@pytest.mark.parametrize("case", ["int8, groups with a rest", pytest.param("int4 x int8", marks=SLOW)])
def test_gradients_of_x_and_bias(case, implementation):
    x, weight, bias, options = make(case)
    options |= {"activation": "silu"}
    dy = np.random.default_rng(2).standard_normal((len(x), len(bias))).astype(np.float32)

    def loss(x, weight, bias, implementation=None):
        y = quantized_matmul(x, weight, bias=bias, implementation=implementation, **options)
        return jnp.sum(y.astype(jnp.promote_types(y.dtype, jnp.float32)) * dy)

    dx, dbias = run(
        lambda x, w, b, implementation: jax.grad(loss, (0, 2))(x, w, b, implementation), implementation, x, weight, bias
    )
    assert dx.dtype == x.dtype and dbias.dtype == bias.dtype
    z = exact(product, x, weight, bias, activation_format=options["activation_format"])
    sigmoid = 1 / (1 + np.exp(-z))
    dz = dy * sigmoid * (1 + z * (1 - sigmoid))
    want = dz @ np.asarray(floats(weight), np.float64)
    rounding = 2.0**-7 if x.dtype == jnp.bfloat16 else 2.0**-16
    np.testing.assert_allclose(np.asarray(dbias), dz.sum(0), atol=rounding * np.abs(dz).sum(0).max())
    room = rounding * np.abs(dz) @ np.abs(np.asarray(floats(weight), np.float64)) + rounding
    assert (np.abs(np.asarray(dx, np.float64) - want) <= room).all()


@ALL
def test_weights_get_no_gradient(implementation):
    x, weight, bias, _ = make("int8, a channel")
    both = run(
        lambda x, w, b, implementation: jax.grad(
            lambda x, w: quantized_matmul(x, w, bias=b, implementation=implementation).sum(), (0, 1), allow_int=True
        )(x, w),
        implementation, x, weight, bias,
    )  # fmt: skip
    assert float(jnp.abs(both[0]).max()) > 0 and float(jnp.abs(both[1].scales).max()) == 0


@ALL
@pytest.mark.parametrize("case", ["int4, a channel", pytest.param("fp8 x fp8", marks=SLOW)])
def test_rows_do_not_meet(case, implementation):
    """A row of inf and one of huge numbers change no bit of the others."""
    _, weight, bias, options = make(case)
    x = jnp.asarray(np.random.default_rng(3).standard_normal((6, weight.shape[1])), F32)
    clean = run(product, implementation, x, weight, bias, **options)
    spoilt = run(product, implementation, x.at[1].set(jnp.inf).at[3].multiply(1e30), weight, bias, **options)
    for row in (0, 2, 4, 5):
        np.testing.assert_array_equal(spoilt[row], clean[row])
    assert not np.isfinite(np.asarray(spoilt[1])).any() and np.isfinite(np.asarray(spoilt[3])).all()


@ALL
@pytest.mark.parametrize("activation_format", [None, "int8"])
def test_sums_of_integers_are_exact(activation_format, implementation):
    """Whole numbers as large as they come, in float32: not one unit is lost."""
    rng = np.random.default_rng(4)
    w, x = rng.integers(-127, 128, (24, 300)), rng.integers(-127, 128, (3, 300))
    w[:, 0], x[:, 0] = 127, 127  # so that scales are one
    weight = quantize(jnp.asarray(w, F32), "int8")
    y = run(quantized_matmul, implementation, jnp.asarray(x, F32), weight, activation_format=activation_format)
    np.testing.assert_array_equal(np.asarray(y), x @ w.T)


def test_static_scale_takes_the_place_of_the_rows():
    x, weight, _, _ = make("int8 x int8")
    y = quantized_matmul(x.astype(F32), weight, activation_format="int8", activation_scale=0.25)
    rounded = np.clip(np.rint(np.asarray(x, np.float64) / 0.25), -127, 127) * 0.25
    np.testing.assert_allclose(y, rounded @ np.asarray(floats(weight), np.float64).T, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("case", "implementation"),
    [
        pytest.param(case, name, marks=() if name == "xla" else SLOW)
        for case in ("int8 x int8", "int4 x int8, groups", "fp8 x fp8", "fp8 x fp8, blocks")
        for name in CANDIDATES
    ],
)
def test_static_scale_is_the_reference(case, implementation):
    """The largest numbers of some rows are beyond its reach; what is not a number spoils its own row."""
    x, weight, bias, options = make(case)
    options["activation_scale"] = np.float32(0.2 if options["activation_format"] == "int8" else 0.05)
    clean = run(product, implementation, x, weight, bias, **options)
    check(x, weight, bias, options, clean)
    spoilt = np.asarray(run(product, implementation, x.at[0, 3].set(jnp.nan), weight, bias, **options))
    assert np.isnan(spoilt[0].astype(np.float32)).all()
    np.testing.assert_array_equal(spoilt[1:], clean[1:])


def test_no_rows_and_leading_dimensions():
    x, weight, bias, _ = make("int4, groups of 32")
    y = quantized_matmul(x, weight, bias=bias, out_dtype=F32)
    assert y.dtype == jnp.float32
    np.testing.assert_array_equal(quantized_matmul(x[:, None], weight, bias=bias, out_dtype=F32)[:, 0], y)
    assert quantized_matmul(x[:0], weight).shape == (0, weight.shape[0])


def test_every_candidate_has_both_directions():
    assert TRANSPOSED.names() == OPERATION.names()
    for name in OPERATION.names():
        assert callable(OPERATION.load(name)) and callable(TRANSPOSED.load(name))


def test_errors_state_the_rule():
    x, weight, bias, _ = make("int8, a channel")
    for words, call in {
        r"floats \[..., 70\]": lambda: quantized_matmul(x[:, 1:], weight),
        r"bias is floats \(45,\)": lambda: quantized_matmul(x, weight, bias=bias[1:]),
        "one of relu, silu": lambda: quantized_matmul(x, weight, activation="swish"),
        "one of int8, fp8": lambda: quantized_matmul(x, weight, activation_format="int4"),
        "meet weights fp8_e4m3": lambda: quantized_matmul(x, weight, activation_format="fp8"),
        "give activation_format too": lambda: quantized_matmul(x, weight, activation_scale=1.0),
        "is a QuantizedWeight": lambda: quantized_matmul(x, weight.values),
        "no implementation 'fast'": lambda: quantized_matmul(x, weight, implementation="fast"),
        "out_dtype is a float": lambda: quantized_matmul(x, weight, out_dtype=jnp.int32),
    }.items():
        with pytest.raises(ValueError, match=words):
            call()

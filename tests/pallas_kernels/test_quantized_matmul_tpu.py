"""quantized_matmul on a TPU: its ways for other chips and many rows, in interpret mode, and through the compiler."""

import importlib.util
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from benchmarks.static import Program, Request, compile_all
from tests.pallas_kernels import test_quantized_matmul as contract
from twinax.pallas_kernels import tuned
from twinax.pallas_kernels.chips import target_chip
from twinax.pallas_kernels.quantized_matmul import (
    INPUTS_FIRST,
    quantize,
    quantized_matmul,
    tpu,
    tpu_codes,
    tpu_kernel,
    with_inputs_first,
    xla,
)
from twinax.pallas_kernels.quantized_matmul.formats import from_e2m1
from twinax.pallas_kernels.quantized_matmul.tpu_codes import E5M2, UNITS, eleven, spread
from twinax.pallas_kernels.quantized_matmul.tpu_rows import evens_first, operand, split

SLOW = pytest.mark.slow
CHIPS = ("v5e", "v5p", "v6e", "7x")
compiles = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
# Chip, most inputs of a block, then as in the contract.
CASES = {
    "scaled first": ("v6e", 1 << 14, (40, 96, 40, "int4", (1, 32), True, None, "bfloat16", "silu")),
    "scaled first, powers of two": ("v5e", 1 << 14, (40, 160, 40, "mxfp4", (1, 32), False, None, "bfloat16", None)),
    "scaled first, in bfloat16": ("v6e", 1 << 14, (100, 256, 40, "int4", (1, 128), False, None, "bfloat16", None)),
    "scaled first, whole zero points": ("7x", 1 << 14, (70, 256, 40, "int4", (1, 128), True, None, "bfloat16", None)),
    "zero points as they are": ("v6e", 1 << 14, (9, 1024, 40, "int4", (1, 128), True, None, "bfloat16", None)),
    "few rows of e2m1": ("v6e", 1 << 14, (3, 160, 40, "mxfp4", (1, 32), False, None, "bfloat16", None)),
    "few rows of e2m1, float32": ("v5e", 1 << 14, (9, 160, 40, "mxfp4", (1, 32), False, None, "float32", None)),
    "few rows of float8": ("v6e", 1 << 14, (3, 300, 140, "fp8_e4m3", (1, 128), False, None, "float32", None)),
    "no float8": ("v4", 1 << 14, (3, 300, 140, "fp8_e4m3", (1, 128), False, None, "bfloat16", None)),
    "no float8, four bits": ("v4", 1 << 14, (3, 1024, 140, "int4", (1, 128), True, None, "float32", None)),
    "one zero point each": ("v5e", 1 << 14, (3, 256, 40, "int4", (1, None), True, None, "float32", None)),
    "many rows": ("v5e", 1 << 14, (40, 70, 200, "int8", (1, None), True, None, "bfloat16", None)),
    "many rows of four bits": ("v5e", 1 << 14, (40, 70, 200, "int4", (1, None), True, None, "bfloat16", None)),
    "many rows of four bits, 7x": ("7x", 1 << 14, (140, 70, 40, "int4", (1, None), False, None, "bfloat16", None)),
    "many rows of float8": ("v5e", 1 << 14, (100, 300, 40, "fp8_e4m3", (128, 128), False, None, "bfloat16", None)),
    "many rows of e2m1": ("v5e", 1 << 14, (100, 32, 40, "mxfp4", (1, 32), False, None, "bfloat16", None)),
    "many sums scaled": ("v5e", 1 << 14, (40, 300, 40, "int4", (1, 128), True, None, "bfloat16", None)),
    "codes as float8": ("7x", 1 << 14, (3, 300, 40, "int4", (1, 128), True, None, "float32", None)),
    "codes as float8, eight blocks": ("7x", 1 << 14, (3, 1024, 40, "int4", (1, 128), False, None, "bfloat16", "relu")),
    "two cores": ("v5p", 1 << 14, (3, 300, 2040, "int8", (1, None), False, None, "bfloat16", None)),
    "no int8 unit": ("7x", 1 << 14, (3, 300, 40, "int8", (1, 64), False, None, "float32", None)),
    "rows rounded inside": ("v5e", 1 << 14, (64, 300, 140, "int8", (1, None), True, "int8", "bfloat16", None)),
    "rows rounded inside, four bits": ("v6e", 1 << 14, (9, 512, 40, "int4", (1, None), True, "int8", "float32", None)),
    "rows rounded inside, float8": ("7x", 1 << 14, (3, 300, 40, "fp8_e4m3", (1, None), False, "fp8", "bfloat16", None)),
    "blocks of inputs": ("v5e", 256, (3, 600, 140, "int8", (1, None), False, "int8", "float32", "relu")),
    "copies, outputs first": ("v5e", 256, (3, 600, 1100, "int8", (1, None), False, None, "bfloat16", None)),
    "copies, inputs first": ("v6e", 1 << 14, (3, 256, 1100, "int4", (1, 128), True, None, "bfloat16", None)),
    "copies, rows rounded inside": ("v5e", 1 << 14, (3, 256, 1100, "int8", (1, None), False, "int8", "bfloat16", None)),
    "blocks of grouped inputs": ("v6e", 1024, (3, 1300, 40, "int4", (1, 128), True, "int8", "float32", None)),
    "blocks of float8 with a rest": ("v6e", 256, (3, 600, 40, "fp8_e4m3", (1, None), False, None, "bfloat16", None)),
    "several tiles of rows": ("v5e", 1 << 14, (150, 64, 40, "int4", (1, 64), False, None, "float32", "gelu")),
}
QUICK = (
    "scaled first, in bfloat16",
    "zero points as they are",
    "few rows of e2m1",
    "many rows of four bits",
    "many rows of float8",
    "codes as float8, eight blocks",
    "rows rounded inside",
    "copies, outputs first",
    "copies, inputs first",
)


@pytest.mark.parametrize("case", [name if name in QUICK else pytest.param(name, marks=SLOW) for name in CASES])
def test_every_way_is_the_reference(case, monkeypatch):
    chip, most_inputs, sizes = CASES[case]
    for module in (tpu, tpu_kernel, tpu_codes):
        monkeypatch.setattr(module, "target_chip", lambda: chip)
    monkeypatch.setattr(tpu, "MOST_INPUTS", most_inputs)
    monkeypatch.setattr(contract, "CASES", {case: sizes})
    x, weight, bias, options = contract.make(case)
    cut = tpu.plan(len(x), x.dtype, weight, options["activation_format"], chip)
    assert cut.scaled_first == case.startswith("scaled first")
    assert cut.copies == 4 or "copies" not in case
    y = contract.run(contract.product, "tpu", x, weight, bias, **options)
    contract.check(x, weight, bias, options, y)


@pytest.mark.parametrize(
    ("chip", "format", "sizes", "activation_format"),
    [
        ("7x", "int8", (3, 300, 140), None),
        pytest.param("7x", "fp8_e4m3", (3, 300, 140), None, marks=SLOW),
        pytest.param("v6e", "int8", (20, 300, 40), "int8", marks=SLOW),
        pytest.param("v5e", "fp8_e4m3", (3, 600, 140), "fp8", marks=SLOW),
    ],
)
def test_inputs_first_change_nothing(chip, format, sizes, activation_format, monkeypatch):
    monkeypatch.setattr(tpu, "target_chip", lambda: chip)
    monkeypatch.setattr(tpu, "MOST_INPUTS", 256 if chip == "v5e" else 1 << 14)
    case = (*sizes, format, (1, None), False, activation_format, "bfloat16", None)
    monkeypatch.setattr(contract, "CASES", {"only": case})
    x, weight, bias, options = contract.make("only")
    turned = with_inputs_first(weight)
    assert turned.values.shape == weight.values.shape[::-1] and turned.shape == weight.shape
    y = contract.run(contract.product, "tpu", x, turned, bias, **options)
    contract.check(x, weight, bias, options, y)
    np.testing.assert_array_equal(y, contract.run(contract.product, "tpu", x, weight, bias, **options))


@pytest.mark.parametrize(
    ("chip", "format", "block", "zeros"),
    [
        ("7x", "fp8_e4m3", (128, 128), False),
        pytest.param("v6e", "fp8_e4m3", (1, 128), False, marks=SLOW),
        pytest.param("v6e", "int8", (1, 64), True, marks=SLOW),
    ],
)
def test_many_rows_meet_weights_that_were_scaled(chip, format, block, zeros, monkeypatch):
    monkeypatch.setattr(tpu, "target_chip", lambda: chip)
    monkeypatch.setattr(contract, "CASES", {"only": (200, 300, 140, format, block, zeros, None, "bfloat16", None)})
    x, weight, bias, options = contract.make("only")
    weight = with_inputs_first(weight)
    assert tpu.plan(len(x), x.dtype, weight, None, chip).scaled_first
    contract.check(x, weight, bias, options, contract.run(contract.product, "tpu", x, weight, bias, **options))


@pytest.mark.parametrize("activation_format", [None, "int8"])
def test_rows_that_are_not_finite_are_no_numbers(activation_format, monkeypatch):
    monkeypatch.setattr(tpu, "target_chip", lambda: "v6e")
    x = jnp.ones((4, 256)).at[1, 7].set(jnp.inf).at[2, 200].set(jnp.nan).at[3, 0].set(3e38)
    weight = quantize(jnp.ones((8, 256)), "int8", block=(1, None))
    y = np.asarray(contract.run(contract.product, "tpu", x, weight, None, activation_format=activation_format))
    assert np.isnan(y[1:3]).all() and np.isfinite(y[0]).all() and np.isfinite(y[3]).all()


def test_its_transposed_product_is_xlas():
    assert tpu.quantized_matmul_transposed is xla.quantized_matmul_transposed


@pytest.mark.parametrize("dtype", ["int8", "bfloat16"])
def test_pieces_add_up(dtype):
    x = np.random.default_rng(0).standard_normal((5, 64)).astype(np.float32) * np.float32(
        [[1], [1e30], [1e-20], [0], [1]]
    )
    x[4, 0] = np.inf
    taken = operand(jnp.dtype(dtype), jnp.dtype("float32"))
    pieces, scales = split(jnp.asarray(x), taken)
    total = sum(w * np.asarray(piece, np.float64) for w, piece in zip(taken.weights, pieces, strict=True))
    total = total * np.asarray(scales, np.float64)
    error = np.abs(total[:4] - x[:4]).max(axis=1)
    assert (error <= 2.0**-22 * np.abs(x[:4]).max(axis=1)).all() and not np.isfinite(total[4]).all()


@pytest.mark.parametrize("form", ["fp8_e4m3", "mxfp4"])
def test_every_number_is_one_of_another_float8(form):
    """With the bias of 11, a sixteenth: no negative zero, which is nan there, and nan as 480."""
    codes = np.arange(256, dtype=np.uint8).repeat(16)

    def kernel(x_ref, *refs):
        words = pltpu.bitcast(x_ref[...], jnp.int32)
        made = [eleven(x_ref[...])] if form == "fp8_e4m3" else spread(form, words, E5M2)
        for ref, x in zip(refs, made, strict=True):
            ref[...] = x.astype(jnp.float32)

    # In interpret mode the bytes of a word are rows that follow one another, as on a TPU.
    x = jnp.asarray(codes.reshape(32, 128))
    shapes = [jax.ShapeDtypeStruct((32, 128), jnp.float32)] * (1 if form == "fp8_e4m3" else 2)
    found = pl.pallas_call(kernel, out_shape=shapes, interpret=True)(x)
    if form == "mxfp4":
        numbers = np.asarray(from_e2m1(jnp.arange(16)), np.float32) / UNITS[form, E5M2]
        wanted = [numbers[codes & 15], numbers[codes >> 4]]
    else:
        numbers = np.asarray(jax.lax.bitcast_convert_type(jnp.asarray(codes), jnp.float8_e4m3fn), np.float32)
        wanted = [np.where(np.isnan(numbers), np.where(codes > 127, -480, 480), numbers) / 16]
    for y, want in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(np.asarray(y), want.reshape(32, 128))


def test_evens_come_first():
    x = np.arange(2 * 512, dtype=np.float32).reshape(2, 512)
    want = np.concatenate([np.concatenate([t[:, ::2], t[:, 1::2]], axis=1) for t in np.split(x, 2, axis=1)], axis=1)
    np.testing.assert_array_equal(evens_first(jnp.asarray(x), 256), want)


@pytest.mark.parametrize("chip", CHIPS)
def test_outputs_of_a_block_can_be_tuned(chip):
    weight = jax.eval_shape(lambda w: quantize(w, "int4", block=(1, 128)), jax.ShapeDtypeStruct((1536, 512), "float32"))
    choose = partial(tpu.plan, 5, jnp.dtype("bfloat16"), weight, None, chip)
    with tuned.asked() as asked:
        closed = choose()
    ((operation, key),) = asked
    first, *others = tpu.tuning_space(chip, key)
    assert first == {} and {"outputs": 768} in others
    for given in others:
        with tuned.using(operation, key, given):
            assert choose() == replace(closed, **given)


def test_refusals_say_why():
    x, weight = jnp.zeros((2, 48)), quantize(jnp.ones((8, 48)), "int8", block=(1, 24))
    with pytest.raises(NotImplementedError, match="multiples of 128, got 24"):
        quantized_matmul(x, weight, implementation="tpu")


def program(target, M, I, O, format, block, activation_format=None):
    block = tuple(block)
    with target.context():
        turn = with_inputs_first if target_chip() in INPUTS_FIRST else lambda weight: weight
    made = jax.eval_shape(
        lambda w: turn(quantize(w, format, block=block, zero_points=format == "int4")),
        jax.ShapeDtypeStruct((O, I), "float32"),
    )
    weight = jax.tree.map(lambda x: target.array(x.shape, x.dtype), made)
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(made))
    return Program(
        lambda x, w: quantized_matmul(x, w, activation_format=activation_format, implementation="tpu"),
        (target.array((M, I)), weight),
        2.0 * M * I * O,
        float(size),
    )


@compiles
@pytest.mark.parametrize("chip", [pytest.param(chip, marks=SLOW) for chip in CHIPS])
def test_compiles_and_reads_int8_at_the_speed_of_memory(chip):
    """Decoding's wide product: within 1.15 of the time to read the weights, where the unit multiplies int8."""
    given = {"M": 16, "I": 4096, "O": 14336, "format": "int8", "block": (1, None)}
    (found,) = compile_all([Request(chip, f"{__file__}:program", given)])
    assert found.failed is None
    # A 7x's unit takes no int8, and bfloat16 weights no faster than 84% of the memory brings their bytes.
    assert found.of_limit >= (0.83 if chip == "7x" else 1 / 1.15)


@compiles
@SLOW
@pytest.mark.parametrize("chip", ["v5e", "7x"])
def test_compiles_every_format(chip):
    kinds = [
        {"M": 3, "I": 2880, "O": 300, "format": "mxfp4", "block": (1, 32)},
        {"M": 3, "I": 1024, "O": 300, "format": "int4", "block": (1, 32)},
        {"M": 100, "I": 1024, "O": 256, "format": "int4", "block": (1, 128)},
        {"M": 17, "I": 1000, "O": 256, "format": "fp8_e4m3", "block": (128, 128), "activation_format": "fp8"},
        {"M": 40, "I": 1024, "O": 256, "format": "int8", "block": (1, 64)},
    ]
    found = compile_all([Request(chip, f"{__file__}:program", kind) for kind in kinds], profiled=False)
    assert [x.failed for x in found] == [None] * len(kinds)

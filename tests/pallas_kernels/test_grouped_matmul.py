"""The contract of grouped_matmul, for every candidate: both directions against loops over rows, in float64."""

import dataclasses
import json
from contextlib import nullcontext
from functools import partial
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from benchmarks.static import Request, compile_all
from tests.pallas_kernels.test_quantized_matmul import quantized
from twinax.pallas_kernels import grouped_matmul as package
from twinax.pallas_kernels import tuned
from twinax.pallas_kernels.grouped_matmul import OPERATION, grouped_matmul, grouped_matmul_dweight, grouped_matmul_dx
from twinax.pallas_kernels.quantized_matmul import dequantize, with_inputs_first

# test_grouped_matmul_gpu.py runs "gpu".
NAMES = [name for name in OPERATION.names() if name != "gpu"]
ALL = pytest.mark.parametrize("implementation", NAMES)

LONGEST = "ends inside tiles"
# Rows of each group, rows of none, I, O.
CASES = {
    "even": ([4, 4, 4, 4], 0, 6, 3),
    "uneven, more than a block": ([0, 21, 1, 300, 0], 5, 6, 3),
    "one group": ([7], 2, 5, 9),
    "all in the last": ([0, 0, 0, 40], 3, 4, 4),
    "none": ([0, 0, 0], 5, 6, 3),
    "one row": ([0, 1], 0, 1, 1),
    LONGEST: ([15, 17, 0, 33, 1, 62], 64, 130, 7),
}


def make(case, dtype=np.float64):
    """x, weight, dy, sizes; rows of no group hold what would show."""
    sizes, rest, I, O = CASES[case]
    rng = np.random.default_rng(list(CASES).index(case))
    N = sum(sizes) + rest
    x_NI, weight_GOI, dy_NO = (rng.standard_normal(s) for s in ((N, I), (len(sizes), O, I), (N, O)))
    x_NI[N - rest :], dy_NO[N - rest :] = np.nan, np.inf
    return *(a.astype(dtype) for a in (x_NI, weight_GOI, dy_NO)), np.asarray(sizes, np.int32)


def by_hand(x_NI, weight_GOI, dy_NO, sizes_G):
    """y, dx and dweight, one row at a time."""
    y, dx, dweight = np.zeros(dy_NO.shape), np.zeros(x_NI.shape), np.zeros(weight_GOI.shape)
    for n, g in enumerate(np.repeat(np.arange(len(sizes_G)), sizes_G)):
        y[n], dx[n] = weight_GOI[g] @ x_NI[n], dy_NO[n] @ weight_GOI[g]
        dweight[g] += np.outer(dy_NO[n], x_NI[n])
    return y, dx, dweight


def run(x_NI, weight_GOI, dy_NO, sizes_G, implementation):
    """y, dx and dweight by differentiation, the sizes known only on the device."""

    @jax.jit
    def function(x, weight, dy, sizes):
        y, pullback = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, implementation=implementation), x, weight)
        return y, *pullback(dy)

    with pltpu.force_tpu_interpret_mode() if implementation == "tpu" else nullcontext():
        return jax.tree.map(np.asarray, function(x_NI, weight_GOI, dy_NO, sizes_G))


@pytest.mark.parametrize(
    ("case", "implementation"),
    [
        # Interpreting a kernel takes seconds.
        pytest.param(
            case, name, marks=[pytest.mark.slow] * (name == "tpu" and case not in ("one row", "none", LONGEST))
        )
        for case in CASES
        for name in NAMES
    ],
)
def test_values_and_gradients_are_those_of_each_row_with_its_weight(case, implementation):
    if implementation == "tpu":
        arguments, tolerance = make(case, np.float32), 2e-6  # a TPU has no float64
    else:
        arguments, tolerance = make(case), 1e-12
    with jax.enable_x64(implementation != "tpu"):
        got = run(*arguments, implementation)
    want = by_hand(*(a.astype(np.float64) for a in arguments[:3]), arguments[3])
    for name, a, b in zip(("y", "dx", "dweight"), got, want, strict=True):
        scale = max(1, np.abs(b).max(initial=0))
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * scale, err_msg=name)


@ALL
def test_bfloat16_is_summed_in_float32(implementation):
    arguments = [jnp.asarray(a, jnp.bfloat16) if a.dtype != np.int32 else a for a in make("uneven, more than a block")]
    got = run(*arguments, implementation)
    want = by_hand(*(np.asarray(a, np.float64) for a in arguments[:3]), arguments[3])
    for a, b in zip(got, want, strict=True):
        assert a.dtype == jnp.bfloat16
        # One rounding of the result, and what float32 sums lose where terms cancel.
        np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize(
    ("form", "block", "zeros", "implementation"),
    [
        ("int8", (1, None), False, "xla"),
        ("int4", (1, 32), True, "xla"),
        ("fp8_e4m3", (None, 32), False, "xla"),
        ("mxfp4", (1, 32), False, "xla"),
        ("mxfp4", (1, 32), False, "reference"),
        pytest.param("int4", (1, 32), True, "tpu", marks=pytest.mark.slow),
    ],
)
def test_quantised_weights_are_their_floats_and_get_no_gradient(form, block, zeros, implementation):
    rng = np.random.default_rng(4)
    sizes_G = np.asarray([3, 0, 9], np.int32)
    x_NI, dy_NO = (rng.standard_normal((14, n)).astype(np.float32) for n in (64, 6))
    weight = quantized(rng.standard_normal((3, 6, 64)).astype(np.float32), form, block, zeros)
    floats = np.asarray(jax.jit(dequantize)(weight), np.float64)

    @jax.jit
    def function(x, weight, dy):
        y, pullback = jax.vjp(lambda x: grouped_matmul(x, weight, sizes_G, implementation=implementation), x)
        return y, *pullback(dy)

    with pltpu.force_tpu_interpret_mode() if implementation == "tpu" else nullcontext():
        got = jax.tree.map(np.asarray, function(x_NI, weight, dy_NO))
    want = by_hand(x_NI.astype(np.float64), floats, dy_NO.astype(np.float64), sizes_G)
    for name, a, b in zip(("y", "dx"), got, want, strict=False):
        np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-6 * np.abs(b).max(), err_msg=name)


QUANTISED = {
    "int8": ("int8", (1, None), False, False),
    "int8, inputs first": ("int8", (1, None), False, True),
    "int8 in groups, inputs first": ("int8", (1, 128), True, True),
    "int4 in groups": ("int4", (1, 32), True, False),
    "int4, a channel": ("int4", (1, None), False, False),
    "float8 in blocks": ("fp8_e4m3", (128, 128), False, True),
    "mxfp4": ("mxfp4", (1, 32), False, False),
}


@pytest.mark.parametrize("cut", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize(
    "kind", [k if k in ("int8", "int4 in groups") else pytest.param(k, marks=pytest.mark.slow) for k in QUANTISED]
)
def test_a_tpu_reads_quantised_weights_as_they_are_kept(kind, cut, monkeypatch):
    """Several visits a group, an empty group, rows of none; with and without cut terms."""
    from twinax.pallas_kernels.grouped_matmul import blocks, tpu

    form, block, zeros, inputs_first = QUANTISED[kind]
    sizes, I, O = [70, 0, 3, 55], 512, 256
    rng = np.random.default_rng(1)
    weight = quantized(rng.standard_normal((4, O, I)).astype(np.float32), form, block, zeros)
    weight = with_inputs_first(weight) if inputs_first else weight
    monkeypatch.setattr(tpu, "dequantize", None)
    given = [jnp.asarray(rng.standard_normal((140, n)), jnp.bfloat16) for n in (I, O)]
    floats = jax.jit(dequantize)(weight)
    exact = [np.asarray(a, np.float64) for a in (given[0], floats, given[1])]
    wants = by_hand(*exact, sizes)
    sums = by_hand(*map(np.abs, exact), sizes)
    for rows, want, terms, contract in zip(given, wants, sums, (2, 1), strict=False):
        A, C = (I, O) if contract == 2 else (O, I)
        cuts = blocks.ProductBlocks(32, C // 2, A // 2, (32, 16), C // 4, C // 2) if cut else None
        if cut and kind == "mxfp4":
            cuts = dataclasses.replace(cuts, a=A if contract == 2 else A // 2, c=C if contract == 1 else C // 2)
        with pltpu.force_tpu_interpret_mode():
            got = jax.jit(partial(tpu.with_weights, contract=contract, blocks=cuts))(
                rows, weight, jnp.asarray(sizes, jnp.int32)
            )
        # Weights are rounded, or rows times scales; then the result.
        assert (np.abs(np.asarray(got, np.float64) - want) <= 2**-8 * (terms + np.abs(want)) + 1e-6).all(), contract


@pytest.mark.parametrize("static", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_tpu_kernels_with_several_blocks_of_every_kind(static):
    """Terms, columns and rows are cut, the last blocks reach beyond the arrays, and pieces back over each other; two
    tiles are one group's alone."""
    from twinax.pallas_kernels.grouped_matmul import blocks, tpu

    sizes, I, O = [70, 0, 3, 329, 64, 1, 0], 384, 200
    rng = np.random.default_rng(0)
    N = sum(sizes) + 50
    x_NI, weight_GOI, dy_NO = (
        rng.standard_normal(shape).astype(np.float32) for shape in ((N, I), (len(sizes), O, I), (N, O))
    )
    x_NI[N - 50 :], dy_NO[N - 50 :] = np.inf, np.nan
    sizes_G = np.asarray(sizes, np.int32)
    want = by_hand(*(a.astype(np.float64) for a in (x_NI, weight_GOI, dy_NO)), sizes_G)
    forward = blocks.ProductBlocks(n=128, c=128, a=128, s=(64, 32), chunk=128, wide=128)
    back = blocks.ProductBlocks(n=128, c=256, a=200, s=(64, 32), chunk=128, wide=256)
    weight_blocks = blocks.GradientBlocks(n=128, o=128, i=256, s=(64, 32))

    def products(x, weight, dy, given):
        y = tpu.product(x, weight, given, contract=2, blocks=forward)
        dx = tpu.product(dy, weight, given, contract=1, blocks=back)
        return y, dx, tpu.gradient(x, dy, given, blocks=weight_blocks)

    # What runs while a kernel is interpreted may wait for it forever: one program, and nothing beside it.
    with pltpu.force_tpu_interpret_mode():
        if static:
            got = jax.jit(lambda *arrays: products(*arrays, tuple(sizes)))(x_NI, weight_GOI, dy_NO)
        else:
            got = jax.jit(products)(x_NI, weight_GOI, dy_NO, sizes_G)
        got = jax.tree.map(np.asarray, got)
    for name, a, b in zip(("y", "dx", "dweight"), got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-6 * np.abs(b).max(), err_msg=name)


def test_visits_by_arithmetic_are_those_of_the_table():
    from twinax.pallas_kernels.grouped_matmul.visits import Known, visits

    for sizes, N, tile in (([3, 5] * 6, 48, 8), ([16] * 4, 64, 16), ([0, 9, 0, 1, 20], 40, 4), ([0, 0], 5, 8)):
        for rest in (False, True):
            found = jax.jit(partial(visits, N=N, tile=tile, rest=rest))(jnp.asarray(sizes, jnp.int32))
            known = Known(sizes, N, tile, rest=rest)
            assert known.count == int(found.count)
            table = jax.jit(jax.vmap(lambda v, known=known: jnp.stack([known[row, v] + 0 * v for row in range(5)])))
            np.testing.assert_array_equal(table(jnp.arange(known.count)).T, found.table_5V[:, : known.count])


def test_ragged_dot_means_the_same():
    """What accelerators run without a kernel, computed here by XLA's dense product of all groups."""
    from twinax.pallas_kernels.grouped_matmul import xla

    rng = np.random.default_rng(1)
    sizes_G = jnp.asarray([5, 0, 15], jnp.int32)
    with jax.enable_x64(True):
        x_NI, weight_GOI = (jnp.asarray(rng.standard_normal(shape)) for shape in ((20, 6), (3, 4, 6)))
        want = grouped_matmul(x_NI, weight_GOI, sizes_G, implementation="xla")
        np.testing.assert_allclose(xla._by_ragged_dot(x_NI, weight_GOI, sizes_G, 2), want, rtol=1e-12)
        back = grouped_matmul_dx(want, weight_GOI, sizes_G, implementation="xla")
        np.testing.assert_allclose(xla._by_ragged_dot(want, weight_GOI, sizes_G, 1), back, rtol=1e-12)


@pytest.mark.usefixtures("full_compile")
@pytest.mark.parametrize(("I", "O"), [(64, 176), (512, 100), (1408, 512)])
def test_a_row_has_the_same_bits_in_any_company(I, O):
    rng = np.random.default_rng(3)
    function = jax.jit(grouped_matmul)
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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": np.zeros((4, 5), np.float32)}, r"x \[N, I\] and weight \[G, O, I\], got \(4, 5\), \(2, 3, 6\)"),
        ({"weight": np.zeros((2, 3, 6), np.float16)}, "one floating dtype, got float32 and float16"),
        ({"sizes": np.zeros(3, np.int32)}, r"one number a group, \(2,\), got \(3,\)"),
        ({"sizes": np.zeros(2, np.float32)}, "sizes is int32, at least one group; got float32"),
    ],
)
def test_what_breaks_a_rule_is_refused(change, message):
    arguments = {"x": np.zeros((4, 6), np.float32), "weight": np.zeros((2, 3, 6), np.float32)}
    arguments |= {"sizes": np.zeros(2, np.int32)} | change
    with pytest.raises(ValueError, match=message):
        grouped_matmul(*arguments.values())
    with pytest.raises(ValueError, match="as many rows, got"):
        grouped_matmul_dweight(arguments["x"], np.zeros((7, 2), np.float32), np.zeros(2, np.int32))


def test_the_three_products_have_the_same_candidates():
    assert OPERATION.names() == package.DX.names() == package.DWEIGHT.names()
    for name in OPERATION.names():
        assert all(operation.load(name) for operation in (OPERATION, package.DX, package.DWEIGHT))


def program(target, sizes, I, O, rest, dtype, blocks=None):
    """All three products, the sizes known on the device only; called in the compiler's process."""
    from benchmarks.static import Program

    def products(x, weight, dy, sizes):
        y, pullback = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, implementation="tpu"), x, weight)
        return y, *pullback(dy)

    N, G = sum(sizes) + rest, len(sizes)
    shapes = (N, I), (G, O, I), (N, O)
    return Program(products, (*(target.array(s, dtype) for s in shapes), target.array((G,), "int32")), 0.0, 0.0)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize("chip", ["v5e", "v5p", "v6e", "7x"])
def test_it_compiles(chip):
    """Sizes that fill no registers, cut in two or more everywhere, and float32; a layer of a real mixture."""
    kinds = [
        {"sizes": [9, 0, 3], "I": 100, "O": 72, "rest": 5, "dtype": "bfloat16"},
        {"sizes": [200, 0, 300], "I": 256, "O": 384, "rest": 12, "dtype": "bfloat16"},
        {"sizes": [9, 0, 3], "I": 128, "O": 40, "rest": 5, "dtype": "float32"},
        {"sizes": [256] * 128, "I": 2048, "O": 768, "rest": 0, "dtype": "bfloat16"},
    ]
    found = compile_all([Request(chip, f"{__file__}:program", kind) for kind in kinds], profiled=False)
    assert [x.failed for x in found] == [None] * len(kinds)


@pytest.mark.parametrize("chip", ["v5e", "v5p", "v6e", "7x"])
@pytest.mark.parametrize("kernel", ["forward", "dx", "dweight"])
@pytest.mark.parametrize("sizes", [(4096, 1408, 2560, 7), (32768, 2048, 768, 128), (8192, 4096, 14336, 8)])
def test_block_sizes_are_the_closed_form_or_what_was_tuned(chip, kernel, sizes, monkeypatch):
    from twinax.pallas_kernels.grouped_matmul import blocks, tpu

    monkeypatch.setattr(blocks, "target_chip", lambda: chip)
    # Nothing was tuned for these shapes.
    sizes = (*sizes, jnp.bfloat16)
    choose = partial(blocks.gradient_blocks, *sizes)
    if kernel != "dweight":
        choose = partial(blocks.product_blocks, *sizes, 2 if kernel == "forward" else 1)
    with tuned.asked() as asked:
        closed = choose()
    ((operation, key),) = asked
    space = tpu.tuning_space(chip, key)
    assert space[0] == dataclasses.asdict(closed) and 2 < len(space) <= 12
    for other in space:
        with tuned.using(operation, key, json.loads(json.dumps(other))):
            assert dataclasses.asdict(choose()) == other

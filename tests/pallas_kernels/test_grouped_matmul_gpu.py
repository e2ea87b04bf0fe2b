"""grouped_matmul's GPU kernels: in Pallas's interpreter, or on a GPU where there is one, and through the compiler."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from benchmarks.static import Program
from tests.pallas_kernels import gpu_programs
from tests.pallas_kernels.gpu_emulator import emulate
from tests.pallas_kernels.test_grouped_matmul import CASES, LONGEST, by_hand, make, run
from twinax.pallas_kernels.grouped_matmul import (
    gpu_blackwell,
    gpu_hopper,
    gpu_hopper_dweight,
    gpu_triton,
    grouped_matmul,
)
from twinax.pallas_kernels.quantized_matmul import dequantize, gpu, quantize
from twinax.pallas_kernels.quantized_matmul import gpu_hopper as quantized
from twinax.pallas_kernels.quantized_matmul import gpu_triton as products

GPU = jax.default_backend() == "gpu"
SLOW = pytest.mark.slow
QUICK = ("none", LONGEST)


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """Triton's kernels run in Pallas's interpreter, where there is no GPU."""
    if not GPU:
        monkeypatch.setattr(gpu, "known_platform", lambda: "cuda")
        for module in (products, gpu_triton):
            monkeypatch.setattr(module.pl, "pallas_call", partial(pl.pallas_call, interpret=True))


@pytest.mark.parametrize("case", [case if case in QUICK else pytest.param(case, marks=SLOW) for case in CASES])
def test_values_and_gradients_are_those_of_each_row_with_its_weight(case):
    arguments = make(case, np.float32)
    got = run(*arguments, "gpu")
    want = by_hand(*(a.astype(np.float64) for a in arguments[:3]), arguments[3])
    for name, a, b in zip(("y", "dx", "dweight"), got, want, strict=True):
        scale = max(1, np.abs(b).max(initial=0))
        np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-6 * scale, err_msg=name)


@SLOW
def test_bfloat16_is_summed_in_float32():
    arguments = [jnp.asarray(a, jnp.bfloat16) if a.dtype != np.int32 else a for a in make("uneven, more than a block")]
    got = run(*arguments, "gpu")
    want = by_hand(*(np.asarray(a, np.float64) for a in arguments[:3]), arguments[3])
    for a, b in zip(got, want, strict=True):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize(
    ("form", "block", "zeros"),
    [
        pytest.param("int4", (1, 32), True, marks=SLOW),
        ("int8", (1, None), True),
        pytest.param("fp8_e4m3", (None, 32), False, marks=SLOW),
        pytest.param("mxfp4", (1, 32), False, marks=SLOW),
    ],
)
def test_quantised_weights_are_their_floats(form, block, zeros):
    rng = np.random.default_rng(4)
    sizes_G = np.asarray([3, 0, 9], np.int32)
    x_NI, dy_NO = (rng.standard_normal((14, n)).astype(np.float32) for n in (64, 6))
    weight = quantize(rng.standard_normal((3, 6, 64)).astype(np.float32), form, block=block, zero_points=zeros)
    floats = np.asarray(dequantize(weight), np.float64)

    @jax.jit
    def function(x, weight, dy):
        y, pullback = jax.vjp(lambda x: grouped_matmul(x, weight, sizes_G, implementation="gpu"), x)
        return y, *pullback(dy)

    got = function(x_NI, weight, dy_NO)
    want = by_hand(x_NI.astype(np.float64), floats, dy_NO.astype(np.float64), sizes_G)
    for name, a, b in zip(("y", "dx"), got, want, strict=False):
        np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-6 * np.abs(b).max(), err_msg=name)


# Rows of each group, rows of none, I, O, and a plan of three processors: warpgroups down and across, columns, stages.
HOPPERS = {
    "ends inside tiles": ([70, 0, 130, 5], 30, 128, 192, (2, 1, 128, 2)),
    "few rows": ([3, 0, 2], 4, 64, 64, (1, 2, 64, 3)),
    "overlapping columns": ([1, 90, 0, 37, 64], 8, 192, 192, (1, 2, 64, 2)),
    "whole tiles": ([128, 256], 0, 64, 128, (2, 1, 64, 4)),
    "none": ([0, 0], 70, 64, 64, (2, 1, 64, 2)),
}


@pytest.mark.parametrize("case", [case if case == LONGEST else pytest.param(case, marks=SLOW) for case in HOPPERS])
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=SLOW) for seed in (1, 2))])
def test_hopper(case, seed):
    """On an emulated GPU, where there is none."""
    sizes, rest, I, O, plan = HOPPERS[case]
    if GPU and gpu.target_chip() not in gpu.HOPPER:
        pytest.skip("a kernel for Hopper")
    rng = np.random.default_rng(len(case))
    N, plan = sum(sizes) + rest, gpu_hopper.Plan(*plan, processors=3)
    shapes = (N, I), (len(sizes), O, I), (N, O)
    x, weight, dy = (jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in shapes)
    # What the rows of no group hold would show.
    x, dy = x.at[N - rest :].set(jnp.nan), dy.at[N - rest :].set(jnp.inf)
    of_gradient = gpu_hopper.Plan(2, 1, min(plan.c, I), 2, processors=3)

    def products(x, weight, dy, sizes):
        y, dx = (gpu_hopper.product(a, weight, sizes, c, plan) for a, c in ((x, 1), (dy, 0)))
        return y, dx, gpu_hopper_dweight.dweight(x, dy, sizes, of_gradient)

    run = jax.jit(products) if GPU else emulate(products, seed)
    got = run(x, weight, dy, jnp.asarray(sizes, jnp.int32))
    want = by_hand(*(np.asarray(a, np.float64) for a in (x, weight, dy)), np.asarray(sizes, np.int32))
    for name, a, b in zip(("y", "dx", "dweight"), got, want, strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=2**-8, atol=1e-4, err_msg=name)


# Rows of each group, rows of none, I, O, and a plan of three processors: columns, stages.
BLACKWELLS = {
    "ends inside tiles": ([150, 0, 130, 5], 30, 128, 192, (128, 2)),
    "few rows, overlapping columns": ([3, 0, 2], 4, 192, 192, (128, 3)),
    "whole tiles": ([128, 256], 0, 64, 128, (64, 4)),
    "none": ([0, 0], 70, 64, 64, (64, 2)),
}


@pytest.mark.parametrize("case", [case if "few" in case else pytest.param(case, marks=SLOW) for case in BLACKWELLS])
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=SLOW)])
def test_blackwell(case, seed):
    """On an emulated GPU, where there is none."""
    sizes, rest, I, O, plan = BLACKWELLS[case]
    if GPU and gpu.target_chip() not in gpu.BLACKWELL:
        pytest.skip("a kernel for Blackwell")
    rng = np.random.default_rng(len(case))
    N, plan = sum(sizes) + rest, gpu_blackwell.Plan(*plan, processors=3)
    shapes = (N, I), (len(sizes), O, I), (N, O)
    x, weight, dy = (jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in shapes)
    x, dy = x.at[N - rest :].set(jnp.nan), dy.at[N - rest :].set(jnp.inf)  # would show

    def products(x, weight, dy, sizes):
        y, dx = (gpu_blackwell.product(a, weight, sizes, c, plan) for a, c in ((x, 1), (dy, 0)))
        return y, dx, gpu_blackwell.dweight(x, dy, sizes, plan._replace(c=64)) if O >= 128 else None

    run = jax.jit(products) if GPU else emulate(products, seed)
    got = run(x, weight, dy, jnp.asarray(sizes, jnp.int32))
    want = by_hand(*(np.asarray(a, np.float64) for a in (x, weight, dy)), np.asarray(sizes, np.int32))
    for name, a, b in zip(("y", "dx", "dweight"), got, want, strict=True):
        if a is not None:
            np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=2**-8, atol=1e-4, err_msg=name)


@pytest.mark.parametrize(
    ("sizes", "form", "block"),
    [
        ([3, 0, 9, 1], "mxfp4", (1, 32)),
        pytest.param([3, 0, 30, 1], "int4", (1, 64), marks=SLOW),
        pytest.param([100, 0, 30, 77], "int8", (1, None), marks=SLOW),
        pytest.param([100, 0, 30], "fp8_e4m3", (128, 128), marks=SLOW),
    ],
)
def test_hopper_with_quantised_weights(sizes, form, block):
    """On an emulated GPU, where there is none."""
    if GPU and gpu.target_chip() not in gpu.HOPPER:
        pytest.skip("a kernel for Hopper")
    rng = np.random.default_rng(6)
    I, O, rest = 256, 192, 4
    N = sum(sizes) + rest
    weight = quantize(jnp.asarray(rng.standard_normal((len(sizes), O, I)), jnp.float32), form, block=block)
    x = jnp.asarray(rng.standard_normal((N, I)), jnp.bfloat16).at[N - rest :].set(jnp.nan)
    size = block[1] if weight.scales.shape[1] > 1 else None
    cut = quantized.cut_of(N, I, O, size, form in ("int4", "mxfp4"), 3, len(sizes))

    def product(x, weight, sizes):
        return quantized.product(x, weight, None, None, x.dtype, cut, sizes)

    got = (jax.jit(product) if GPU else emulate(product))(x, weight, jnp.asarray(sizes, jnp.int32))
    floats = np.asarray(dequantize(weight), np.float64)
    x = np.asarray(x, np.float64)
    want = by_hand(x, floats, np.zeros((N, O)), np.asarray(sizes, np.int32))[0]
    # The result's rounding, and that of weights which are scaled first.
    group_N = np.repeat(np.arange(len(sizes)), sizes)
    room = np.zeros((N, O))
    for n, g in enumerate(group_N):
        room[n] = np.abs(x[n]) @ np.abs(floats[g]).T
    assert (np.abs(np.asarray(got, np.float64) - want) <= 2**-8 * (np.abs(want) + room)).all()


def test_plans_fit():
    for N, G, size in ((8192, 8, 14336), (64, 8, 768), (4096, 128, 2880), (7, 1, 64)):
        plan = gpu_hopper.plan_of(N, G, size)
        assert plan.stages >= 3 and plan.c * plan.across <= 256 and plan.c <= size
        assert gpu_hopper_dweight.plan_of(size).stages >= 3


def build(target, N, G, I, O, dtype="bfloat16", form=None, block=None):
    """For `benchmarks.static`: all three products, or of quantised weights the product of rows."""
    x, dy, sizes = target.array((N, I), dtype), target.array((N, O), dtype), target.array((G,), "int32")
    forward = partial(grouped_matmul, implementation="gpu")
    if form is not None:
        plain = jax.ShapeDtypeStruct((G, O, I), jnp.float32)
        made = jax.eval_shape(lambda w: quantize(w, form, block=(1, block)), plain)
        return Program(forward, (x, jax.tree.map(lambda a: target.array(a.shape, a.dtype), made), sizes), 0.0, 1.0)

    def products(x, weight, dy, sizes):
        y, pullback = jax.vjp(lambda x, w: forward(x, w, sizes), x, weight)
        return y, *pullback(dy)

    return Program(products, (x, target.array((G, O, I), dtype), dy, sizes), 0.0, 1.0)


COMPILED = [
    {"N": 4096, "G": 8, "I": 2048, "O": 768},
    {"N": 64, "G": 8, "I": 2048, "O": 768},
    {"N": 500, "G": 3, "I": 200, "O": 72},
    {"N": 500, "G": 3, "I": 200, "O": 72, "dtype": "float32"},
    {"N": 4096, "G": 8, "I": 2048, "O": 768, "form": "int8"},
    {"N": 64, "G": 8, "I": 2048, "O": 768, "form": "int4", "block": 64},
    {"N": 4096, "G": 8, "I": 2048, "O": 768, "form": "mxfp4", "block": 32},
    {"N": 512, "G": 128, "I": 2880, "O": 5760, "form": "mxfp4", "block": 32},
]


@SLOW
@pytest.mark.usefixtures("full_compile")
@gpu_programs.all_compile
@pytest.mark.parametrize("chip", ["a100", "h200", "b200"])
def test_compiles_without_spills_or_serialised_products(chip):
    gpu_programs.check(chip, [(__file__, case) for case in COMPILED])

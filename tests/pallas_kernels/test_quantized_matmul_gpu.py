"""quantized_matmul's GPU kernels: in Pallas's interpreter, or on a GPU where there is one, and through the compiler."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from benchmarks.static import Program
from tests.pallas_kernels import gpu_programs
from tests.pallas_kernels.gpu_emulator import emulate
from tests.pallas_kernels.test_quantized_matmul import CASES, check, make, product, quantized, run
from twinax.pallas_kernels.quantized_matmul import (
    gpu,
    gpu_blackwell,
    gpu_hopper,
    gpu_triton,
    quantize,
    quantized_matmul,
    with_inputs_first,
)

GPU = jax.default_backend() == "gpu"
SLOW = pytest.mark.slow
QUICK = ("int4, groups of 32",)
BY_XLA = ("int8 x int8", "int8 x int8, one scale", "fp8 x fp8", "fp8 x fp8, a part of a block")
SPLIT = gpu_triton.Tile(16, 16, 32, splits=4)


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """Triton's kernels run in Pallas's interpreter, where there is no GPU."""
    if not GPU:
        monkeypatch.setattr(gpu, "known_platform", lambda: "cuda")
        monkeypatch.setattr(gpu_triton.pl, "pallas_call", partial(pl.pallas_call, interpret=True))


@pytest.mark.parametrize("case", [case if case in QUICK else pytest.param(case, marks=SLOW) for case in CASES])
def test_is_the_reference(case):
    x, weight, bias, options = make(case)
    if case in BY_XLA:
        with pytest.raises(NotImplementedError, match="XLA's own product"):
            run(product, "gpu", x, weight, bias, **options)
        return
    check(x, weight, bias, options, run(product, "gpu", x, weight, bias, **options))


@pytest.mark.parametrize("case", ["fp8, blocks", pytest.param("int4, groups of 128 with a rest", marks=SLOW)])
def test_split_sums(case, monkeypatch):
    """Of which some have no terms at all."""
    monkeypatch.setattr(gpu_triton, "tile_of", lambda kind: SPLIT)
    x, weight, bias, options = make(case)
    options["activation"] = "silu"
    check(x, weight, bias, options, run(product, "gpu", x, weight, bias, **options))


@pytest.mark.parametrize("case", ["fp8, a channel", pytest.param("int8, groups with a rest", marks=SLOW)])
def test_weights_with_inputs_first(case):
    x, weight, bias, options = make(case)
    turned = with_inputs_first(weight)
    check(x, weight, bias, options, run(product, "gpu", x, turned, bias, **options))


@SLOW
def test_rows_do_not_meet():
    """A row of inf and one of huge numbers change no bit of the others."""
    _, weight, bias, _ = make("int4, a channel")
    x = jnp.asarray(np.random.default_rng(3).standard_normal((6, weight.shape[1])), jnp.float32)
    clean = run(product, "gpu", x, weight, bias)
    spoilt = run(product, "gpu", x.at[1].set(jnp.inf).at[3].multiply(1e30), weight, bias)
    for row in (0, 2, 4, 5):
        np.testing.assert_array_equal(spoilt[row], clean[row])
    assert not np.isfinite(np.asarray(spoilt[1])).any() and np.isfinite(np.asarray(spoilt[3])).all()


# M, I, O, format, block, zero points, activation, splits. Tiles are 128 outputs of two warpgroups, by up to 256 rows.
HOPPERS = {
    "int8, a few rows": (5, 256, 192, "int8", (1, None), False, "silu", 1),
    "int8, split, zero points": (5, 384, 192, "int8", (1, None), True, "gelu", 2),
    "int8, small blocks": (20, 256, 128, "int8", (1, 32), True, None, 1),
    "int8, scaled first": (100, 256, 192, "int8", (1, 128), False, "relu", 1),
    "int8, many rows": (300, 256, 128, "int8", (1, None), False, "silu", 1),
    "fp8, blocks, split": (20, 256, 128, "fp8_e4m3", (128, 128), False, None, 2),
    "int4, a channel": (5, 256, 192, "int4", (1, None), False, "silu", 1),
    "int4, small blocks": (20, 256, 192, "int4", (1, 32), True, None, 1),
    "int4, blocks, split": (20, 512, 256, "int4", (1, 128), True, None, 2),
    "int4, scaled first": (300, 320, 192, "int4", (1, 64), True, None, 1),
    "mxfp4": (40, 192, 192, "mxfp4", (1, 32), False, None, 1),
}
HOPPER_QUICK = ("int8, a few rows", "int4, small blocks")


def weighted(case, sizes):
    """bfloat16 rows, the weight and the bias of a case."""
    (M, I, O, form, block, zeros, *_), rng = sizes, np.random.default_rng(len(case))
    w, x, bias = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((O, I), (M, I), (O,)))
    return x.astype(jnp.bfloat16), quantized(w, form, block, zeros), bias


def hopper(case, seed=0):
    """The product, on an emulated GPU of three processors where there is none, and what it is of."""
    if GPU and gpu.target_chip() not in gpu.HOPPER:
        pytest.skip("a kernel for Hopper")
    M, I, O, form, _, _, activation, splits = HOPPERS[case]
    x, weight, bias = weighted(case, HOPPERS[case])
    size = weight.block[1] if len(weight.scales) > 1 else None
    cut = replace(gpu_hopper.cut_of(M, I, O, size, form in ("int4", "mxfp4"), 3), splits=splits)

    def product(x, weight, bias):
        return gpu_hopper.product(x, weight, bias, activation, x.dtype, cut)

    return jax.jit(product) if GPU else emulate(product, seed), x, weight, bias


@pytest.mark.parametrize(
    ("case", "seed"),
    [
        pytest.param(case, seed, marks=() if case in HOPPER_QUICK and not seed else SLOW)
        for case in HOPPERS
        for seed in ((0, 1, 2) if case in HOPPER_QUICK else (0,))
    ],
)
def test_hopper(case, seed):
    product, x, weight, bias = hopper(case, seed)
    check(x, weight, bias, {"activation": HOPPERS[case][6], "activation_format": None}, product(x, weight, bias))


BLACKWELLS = {
    "int8, a few rows": (5, 256, 192, "int8", (1, None), False, "silu", 1),
    "int8, split, zero points": (5, 512, 192, "int8", (1, None), True, None, 2),
    "int8, blocks": (40, 256, 128, "int8", (1, 64), False, "relu", 1),
    "fp8, many rows": (150, 256, 128, "fp8_e4m3", (128, 128), False, None, 1),
}


def blackwell(case):
    """As `hopper`."""
    if GPU and gpu.target_chip() not in gpu.BLACKWELL:
        pytest.skip("a kernel for Blackwell")
    M, I, O, _, _, _, activation, splits = BLACKWELLS[case]
    cut = gpu_blackwell.cut_of(M, I, O, 3)._replace(splits=splits)

    def product(x, weight, bias):
        return gpu_blackwell.product(x, weight, bias, activation, x.dtype, cut)

    return jax.jit(product) if GPU else emulate(product, 0), *weighted(case, BLACKWELLS[case])


@pytest.mark.parametrize("case", [case if "few" in case else pytest.param(case, marks=SLOW) for case in BLACKWELLS])
def test_blackwell(case):
    product, x, weight, bias = blackwell(case)
    check(x, weight, bias, {"activation": BLACKWELLS[case][6], "activation_format": None}, product(x, weight, bias))


@pytest.mark.parametrize(
    ("kernel", "case"),
    [
        (hopper, "int8, a few rows"),
        pytest.param(hopper, "int4, small blocks", marks=SLOW),  # sums of blocks are scaled
        pytest.param(hopper, "int8, scaled first", marks=SLOW),
        pytest.param(hopper, "int8, split, zero points", marks=SLOW),
        pytest.param(hopper, "mxfp4", marks=SLOW),
        pytest.param(blackwell, "int8, a few rows", marks=SLOW),
        pytest.param(blackwell, "int8, split, zero points", marks=SLOW),
        pytest.param(blackwell, "fp8, many rows", marks=SLOW),
    ],
)
def test_rows_do_not_meet_in_tensor_cores(kernel, case):
    """Nor in the sums of zero points, nor those of splits: as `test_rows_do_not_meet`."""
    product, x, weight, bias = kernel(case)
    clean = product(x, weight, bias)
    spoilt = product(x.at[1].set(jnp.inf).at[3].multiply(1e30), weight, bias)
    others = np.delete(np.arange(len(x)), (1, 3))
    np.testing.assert_array_equal(spoilt[others], clean[others])
    assert np.isfinite(clean.astype(jnp.float32)).all()
    assert not np.isfinite(spoilt[1].astype(jnp.float32)).any() and np.isfinite(spoilt[3].astype(jnp.float32)).all()


def test_hopper_cuts_fit():
    for M in (1, 30, 100, 300):
        for size, packed in ((None, False), (128, False), (None, True), (32, True)):
            for I in (4096, 2880):
                if size == 128 and I % 128:
                    continue
                cut = gpu_hopper.cut_of(M, I, 14336, size, packed)
                assert cut.plan.stages >= 3 and cut.plan.c == cut.n and (I // (2 if packed else 1)) % cut.k == 0


def build(target, M, I, O, form, block=(1, None), rows=None, zeros=False, dtype="bfloat16"):
    """For `benchmarks.static`."""
    plain = jax.ShapeDtypeStruct((O, I), jnp.float32)
    made = jax.eval_shape(lambda w: quantize(w, form, block=tuple(block), zero_points=zeros), plain)
    weight = jax.tree.map(lambda a: target.array(a.shape, a.dtype), made)

    def silu(x, weight, bias):
        return quantized_matmul(x, weight, bias=bias, activation="silu", activation_format=rows, implementation="gpu")

    return Program(silu, (target.array((M, I), dtype), weight, target.array((O,), "float32")), 0.0, 1.0)


LARGE = {"I": 4096, "O": 1024}
COMPILED = [
    *({"M": M, **LARGE, "form": "int8"} for M in (1, 64, 2048)),
    *({"M": M, **LARGE, "form": "int4", "block": (1, 128), "zeros": True} for M in (1, 64, 2048)),
    *({"M": M, **LARGE, "form": "mxfp4", "block": (1, 32)} for M in (16, 2048)),
    *({"M": M, **LARGE, "form": "int8", "block": (1, 64), "rows": "int8"} for M in (16, 2048)),
    *({"M": M, **LARGE, "form": "int4", "rows": "int8"} for M in (16, 2048)),
    {"M": 500, "I": 200, "O": 72, "form": "int4", "block": (1, 32), "dtype": "float32"},
    {"M": 500, "I": 200, "O": 72, "form": "int4"},
    {"M": 128, "I": 4096, "O": 14336, "form": "int8", "dtype": "float16"},
    {"M": 64, "I": 2880, "O": 5760, "form": "mxfp4", "block": (1, 32)},
]
FLOAT8 = [
    *({"M": M, **LARGE, "form": "fp8_e4m3"} for M in (16, 2048)),
    *({"M": M, **LARGE, "form": "fp8_e4m3", "block": (128, 128)} for M in (16, 2048)),
    *({"M": M, **LARGE, "form": "fp8_e4m3", "block": (128, 128), "rows": "fp8"} for M in (16, 2048)),
]


@SLOW
@pytest.mark.usefixtures("full_compile")
@gpu_programs.all_compile
@pytest.mark.parametrize("chip", ["a100", "h200", "b200"])
def test_compiles_without_spills_or_serialised_products(chip):
    cases = COMPILED + (FLOAT8 if chip != "a100" else [])  # before it, no float8
    gpu_programs.check(chip, [(__file__, case) for case in cases])

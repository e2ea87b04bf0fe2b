"""quantized_matmul's GPU kernels: in Pallas's interpreter, or on a GPU where there is one, and through the compiler."""

import shutil
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from benchmarks.static import Program, Request, compile_all
from tests.pallas_kernels.test_quantized_matmul import CASES, check, make, product, run
from twinax.pallas_kernels.quantized_matmul import gpu, gpu_triton, quantize, quantized_matmul
from twinax.planner.devices import has_cuda_plugin

GPU = jax.default_backend() == "gpu"
SLOW = pytest.mark.slow
QUICK = ("int8, groups with a rest", "int4, groups of 32", "int4 x int8", "mxfp4 with a rest")
BY_CUBLAS = ("int8 x int8", "int8 x int8, one scale", "fp8 x fp8")
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
    if case in BY_CUBLAS:
        with pytest.raises(NotImplementedError, match="XLA's, by cuBLAS"):
            run(product, "gpu", x, weight, bias, **options)
        return
    check(x, weight, bias, options, run(product, "gpu", x, weight, bias, **options))


@pytest.mark.parametrize("case", ["int4, groups of 128 with a rest", pytest.param("fp8, blocks", marks=SLOW)])
def test_split_sums(case, monkeypatch):
    """Of which some have no terms at all."""
    monkeypatch.setattr(gpu_triton, "tile_of", lambda kind: SPLIT)
    x, weight, bias, options = make(case)
    options["activation"] = "silu"
    check(x, weight, bias, options, run(product, "gpu", x, weight, bias, **options))


def test_rows_do_not_meet():
    """A row of inf and one of huge numbers change no bit of the others."""
    _, weight, bias, _ = make("int4, a channel")
    x = jnp.asarray(np.random.default_rng(3).standard_normal((6, weight.shape[1])), jnp.float32)
    clean = run(product, "gpu", x, weight, bias)
    spoilt = run(product, "gpu", x.at[1].set(jnp.inf).at[3].multiply(1e30), weight, bias)
    for row in (0, 2, 4, 5):
        np.testing.assert_array_equal(spoilt[row], clean[row])
    assert not np.isfinite(np.asarray(spoilt[1])).any() and np.isfinite(np.asarray(spoilt[3])).all()


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
]
FLOAT8 = [
    *({"M": M, **LARGE, "form": "fp8_e4m3"} for M in (16, 2048)),
    *({"M": M, **LARGE, "form": "fp8_e4m3", "block": (128, 128), "rows": "fp8"} for M in (16, 2048)),
]


@SLOW
@pytest.mark.skipif(not has_cuda_plugin() or not shutil.which("ptxas"), reason="wants JAX's CUDA plug-in and ptxas")
@pytest.mark.parametrize("chip", ["a100", "h200", "b200"])
def test_compiles_without_spills_or_serialised_products(chip):
    cases = COMPILED + (FLOAT8 if chip != "a100" else [])  # before it, no float8
    for case, one in zip(cases, compile_all([Request(chip, f"{__file__}:build", x) for x in cases]), strict=True):
        assert one.failed is None, (case, one.failed)
        assert (one.spills, one.warnings) == (0, ()), (case, one)

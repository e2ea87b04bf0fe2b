"""flash_attention's GPU kernels: their numbers on an emulated GPU, and what the compiler makes of them.

Where there is a GPU, the same cases run on it. Compiling needs JAX's CUDA plug-in and ptxas, but no GPU.
"""

import itertools
import shutil
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from benchmarks.static import Program, Request, compile_all
from tests.pallas_kernels.gpu_emulator import emulate
from twinax.pallas_kernels.flash_attention import (
    OPERATION,
    _check_options,
    blackwell,
    blackwell_backward,
    flash_attention,
    gpu,
    hopper,
    hopper_backward,
    triton,
)
from twinax.pallas_kernels.flash_attention.gradient import differentiable
from twinax.planner.devices import has_cuda_plugin

GPU = jax.default_backend() == "gpu"
NOTHING = {"qk_scale_H": None, "v_scale_H": None, "sinks_H": None}
# B, T, S, H, K, D, E, options. Hopper's tiles are 128 queries, of two halves, and its blocks 64 or 128 keys;
# Blackwell's are two of 128 queries, or one where heads are wide, and the same blocks.
CASES = {
    "one token": (1, 1, 1, 1, 1, 16, 16, {}),
    "causal, grouped, a rest": (1, 140, 140, 2, 1, 32, 32, {}),
    "segments, sinks, softcap": (2, 150, 150, 1, 1, 16, 16, {"segments": True, "sinks": True, "softcap": 2.0}),
    "a window, offsets by row": (2, 130, 300, 1, 1, 16, 16, {"q_offset": (150, -40), "window": 100}),
    "all keys, their number odd": (1, 70, 333, 2, 2, 48, 16, {"causal": False}),
    "window both sides": (1, 150, 300, 1, 1, 16, 16, {"causal": False, "window": 40, "q_offset": 70, "softcap": 3.0}),
    "window, segments": (1, 300, 300, 1, 1, 16, 16, {"segments": True, "window": 33}),
    "rows before the first key": (1, 260, 140, 1, 1, 16, 16, {"q_offset": -140, "sinks": True}),
    "latent": (1, 130, 130, 1, 1, 192, 128, {"softcap": 5.0}),
    "wide": (1, 130, 130, 1, 1, 256, 256, {}),
    "steep": (1, 300, 400, 1, 1, 32, 32, {"causal": False, "scale": 1.5}),
}
QUICK = {
    ("hopper", "one token"),
    ("hopper", "segments, sinks, softcap"),
    ("hopper", "a window, offsets by row"),
    ("blackwell", "a window, offsets by row"),
    ("triton", "causal, grouped, a rest"),
}


def make(case):
    """Inputs in bfloat16, and the options as candidates get them."""
    B, T, S, H, K, D, E, options = CASES[case]
    rng = np.random.default_rng(len(case))
    shapes = ((B, T, H, D), (B, S, K, D), (B, S, K, E), (B, T, H, E))
    *inputs, d_out = (jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in shapes)
    options = {"causal": True, "window": None, "q_offset": 0, "scale": None, "softcap": None} | options
    sinks = jnp.asarray(rng.standard_normal(H), jnp.float32) if options.pop("sinks", False) else None
    ids = None
    if options.pop("segments", False):
        ids = np.sort(rng.integers(1, 4, (B, T)), axis=1)
        ids[:, T // 3 : T // 3 + 2] = 0
        ids[0, -5:] = 0
        ids = jnp.asarray(ids, jnp.int32)
    if isinstance(options["q_offset"], tuple):
        options["q_offset"] = jnp.asarray(options["q_offset"], jnp.int32)
    checked = _check_options(tuple(inputs), q_segment_ids_BT=ids, kv_segment_ids_BS=ids, bias_BHTS=None, **options)
    return tuple(inputs), d_out, NOTHING | checked | {"sinks_H": sinks}


def attention(forward, backward):
    return differentiable(gpu.forward_by(forward), gpu.backward_by(backward))


KERNELS = {
    "hopper": attention(hopper.forward, hopper_backward.backward),
    "blackwell": attention(blackwell.forward, gpu.or_triton(blackwell_backward.backward)),
    "triton": attention(triton.forward, triton.backward),
}


def run(kernel, f):
    """f compiled for the GPU, or where there is none with its kernels emulated."""
    return jax.jit(f) if GPU or kernel == "triton" else emulate(f, seed=1)


@pytest.fixture
def interpreted(monkeypatch):
    """Triton's kernels run in Pallas's interpreter, where there is no GPU."""
    if not GPU:
        monkeypatch.setattr(triton.pl, "pallas_call", partial(pl.pallas_call, interpret=True))


def close(got, wanted, what):
    """Within the rounding to bfloat16 of a result, of probabilities and of their gradients: 2**-8 of the largest."""
    got, wanted = np.asarray(got, np.float64), np.asarray(wanted)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=2**-7 * max(np.abs(wanted).max(), 1e-3), err_msg=what)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    ("kernel", "case"),
    [
        pytest.param(*pair, marks=() if pair in QUICK else pytest.mark.slow)
        for pair in itertools.product(KERNELS, CASES)
    ],
)
def test_output_and_gradients(kernel, case):
    inputs, d_out, options = make(case)
    chips = {"hopper": gpu.HOPPER, "blackwell": gpu.BLACKWELL}
    if GPU and gpu.target_chip() not in chips.get(kernel, gpu.target_chip()):
        pytest.skip("a kernel for another GPU")
    reference = OPERATION.load("reference")
    with jax.enable_x64(True):
        wide = tuple(x.astype(jnp.float64) for x in inputs)
        of_reference = {**options, "bias_BHTS": None}
        (out, lse), pull = jax.vjp(lambda *x: reference(*x, **of_reference), *wide)
        wanted = pull((d_out.astype(jnp.float64), jnp.zeros_like(lse)))
    static = {name: x for name, x in options.items() if not isinstance(x, jax.Array)}
    arrays = {name: x for name, x in options.items() if isinstance(x, jax.Array)}

    def both(inputs, d_out, arrays):
        (out, lse), pull = jax.vjp(lambda *x: KERNELS[kernel](*x, **static, **arrays), *inputs)
        return out, lse, *pull((d_out, jnp.zeros_like(lse)))

    got_out, got_lse, *grads = run(kernel, both)(inputs, d_out, arrays)
    close(got_out, out, "out")
    np.testing.assert_allclose(got_lse, lse, rtol=1e-5, atol=1e-5)
    for name, grad, want in zip(("dq", "dk", "dv"), grads, wanted, strict=True):
        close(grad, want, name)


@pytest.mark.slow
@pytest.mark.skipif(GPU, reason="the order is the GPU's own")
@pytest.mark.parametrize("case", ["steep", "latent", "rows before the first key"])
def test_blackwell_in_any_order(case):
    inputs, d_out, options = make(case)

    def both(*inputs):
        (out, lse), pull = jax.vjp(lambda *x: KERNELS["blackwell"](*x, **options), *inputs)
        return out, *pull((d_out, jnp.zeros_like(lse)))

    results = [emulate(both, seed)(*inputs) for seed in range(4)]
    for result in results[1:]:
        for x, first in zip(result, results[0], strict=True):
            close(x, np.asarray(first, np.float64), case)


def build(target, D, E, kernel=None, segments=False, **options):
    """For `benchmarks.static`: forward and backward of 8 heads of a row, by the kernel that is chosen or the named."""
    B, T, H, K = 1, 512, 8, 4
    arrays = {"ids": target.array((B, T), "int32")} if segments else {}

    def loss(q, k, v, ids=None):
        if kernel is None:
            return flash_attention(q, k, v, q_segment_ids_BT=ids, implementation="gpu", **options).sum()
        checked = _check_options(
            (q, k, v),
            **{"causal": True, "window": None, "q_offset": 0, "scale": None, "softcap": None, **options},
            q_segment_ids_BT=ids,
            kv_segment_ids_BS=ids,
            bias_BHTS=None,
        )
        return KERNELS[kernel](q, k, v, **NOTHING, **checked)[0].sum()

    inputs = target.array((B, T, H, D)), target.array((B, T, K, D)), target.array((B, T, K, E))
    return Program(jax.grad(loss, (0, 1, 2)), (*inputs, *arrays.values()), 0.0, 1.0)


COMPILED = [
    *({"D": D, "E": D} for D in (64, 80, 96, 128, 256)),
    {"D": 192, "E": 128},
    {"D": 128, "E": 128, "causal": False},
    {"D": 128, "E": 128, "segments": True},
    {"D": 128, "E": 128, "window": 100},
    {"D": 128, "E": 128, "segments": True, "window": 100, "softcap": 30.0},
    {"D": 128, "E": 128, "causal": False, "window": 100, "softcap": 30.0},
    {"D": 64, "E": 64, "segments": True, "window": 100, "softcap": 30.0},
    {"D": 256, "E": 256, "segments": True, "window": 100, "softcap": 30.0},
    {"D": 192, "E": 128, "segments": True, "window": 100},
]


@pytest.mark.slow
@pytest.mark.usefixtures("full_compile")
@pytest.mark.skipif(not has_cuda_plugin() or not shutil.which("ptxas"), reason="wants JAX's CUDA plug-in and ptxas")
@pytest.mark.parametrize(
    ("chip", "cases"),
    [
        ("h200", COMPILED),
        ("b200", COMPILED),
        ("a100", [{"D": 128, "E": 128, "segments": True}, {"D": 64, "E": 64, "window": 100}]),
    ],
)
def test_compiles_without_spills_or_serialised_products(chip, cases):
    builder = f"{__file__}:build"
    for case, found in zip(cases, compile_all([Request(chip, builder, case) for case in cases]), strict=True):
        assert found.failed is None, (case, found.failed)
        assert (found.spills, found.warnings) == (0, ()), (case, found)

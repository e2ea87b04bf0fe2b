"""flash_attention's GPU kernels: their numbers on an emulated GPU, and what the compiler makes of them.

Where there is a GPU, the same cases run on it. Compiling needs JAX's CUDA plug-in and ptxas, but no GPU.
"""

import itertools
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from benchmarks.static import Program
from tests.pallas_kernels import gpu_programs
from tests.pallas_kernels import test_flash_attention_tpu as flash_tpu
from tests.pallas_kernels.gpu_emulator import emulate
from tests.pallas_kernels.test_flash_attention import headed, paired
from tests.pallas_kernels.test_flash_attention_backward import check_parts
from twinax.pallas_kernels.flash_attention import (
    OPERATION,
    _check_options,
    blackwell,
    blackwell_backward,
    flash_attention,
    gpu,
    gpu_blocks,
    hopper,
    hopper_backward,
    triton,
)
from twinax.pallas_kernels.flash_attention.gradient import differentiable

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
    "bias of every row, softcap": (2, 140, 150, 2, 1, 16, 16, {"bias": (1, 2), "softcap": 2.0, "q_offset": 10}),
    "bias of every head": (2, 130, 130, 2, 2, 16, 16, {"bias": (2, 1), "segments": True, "sinks": True, "window": 90}),
    "bias of all": (1, 20, 200, 4, 2, 32, 16, {"bias": (1, 1), "causal": False}),
}
for name, (*sizes, options) in (paired(128, 14, H=2, D=16) | headed(140)).items():
    CASES[name] = (*sizes, options.pop("value_size", sizes[-1]), options)
FLOAT8 = {
    "causal, grouped": (1, 140, 200, 4, 2, 64, 32, {"q_offset": 60}),
    "sinks, softcap, heads of 80": (2, 130, 130, 2, 1, 80, 80, {"sinks": True, "softcap": 3.0, "window": 70}),
    "bias, segments": (1, 150, 150, 1, 1, 32, 96, {"segments": True, "bias": (1, 1)}),
}
QUICK = {
    ("hopper", "one token"),
    ("hopper", "segments, sinks, softcap"),
    ("hopper", "a window, offsets by row"),
    ("blackwell", "a window, offsets by row"),
    ("triton", "causal, grouped, a rest"),
    ("hopper", "bias, segments"),
}


def make(case):
    """Inputs in bfloat16, infinite where there is padding, and the options as candidates get them."""
    B, T, S, H, K, D, E, options = CASES[case] if case in CASES else FLOAT8[case]
    rng = np.random.default_rng(len(case))
    shapes = ((B, T, H, D), (B, S, K, D), (B, S, K, E), (B, T, H, E))
    *inputs, d_out = (jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in shapes)
    options = {"causal": True, "window": None, "q_offset": 0, "scale": None, "softcap": None} | options
    sinks = jnp.asarray(rng.standard_normal(H), jnp.float32) if options.pop("sinks", False) else None
    ids = None
    if options.pop("segments", False):
        ids = np.sort(rng.integers(1, 4, (B, T)), axis=1)
        ids[ids == 2] = -1
        ids[:, T // 3 : T // 3 + 2] = 0
        ids[0, -5:] = 0
        ids = jnp.asarray(ids, jnp.int32)
        inputs = [jnp.where((ids == 0)[:, :, None, None], jnp.inf, x) for x in inputs]
    if isinstance(options["q_offset"], tuple):
        options["q_offset"] = jnp.asarray(options["q_offset"], jnp.int32)
    bias = None
    if "bias" in options:
        bias = rng.standard_normal((*options.pop("bias"), T, S))
        bias = np.where(rng.random(bias.shape) < 0.1, -np.inf, bias)
        bias[:, :, T // 2] = -np.inf  # a row that sees nothing
        bias = jnp.asarray(bias, jnp.bfloat16 if B > 1 else jnp.float32)
    checked = _check_options(tuple(inputs), q_segment_ids_BT=ids, kv_segment_ids_BS=ids, bias_BHTS=bias, **options)
    return tuple(inputs), d_out, NOTHING | checked | {"sinks_H": sinks}


@cache
def wanted(case):
    """Of the reference in float64: out, lse, and the gradients of inputs and bias. All kernels are held against it."""
    inputs, d_out, options = make(case)
    learned = {"bias_BHTS": options.pop("bias_BHTS")}
    reference = OPERATION.load("reference")
    with jax.enable_x64(True):
        wide, wide_d_out = jax.tree.map(lambda x: x.astype(np.float64), jax.device_get(((inputs, learned), d_out)))

        @jax.jit
        def plain(wide, d_out):
            (out, lse), pull = jax.vjp(lambda x, more: reference(*x, **options, **more), *wide)
            return out, lse, pull((d_out, jnp.zeros_like(lse)))

        return jax.device_get(plain(wide, wide_d_out))


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


def skip_unless_for_this_gpu(kernel):
    chips = {"hopper": gpu.HOPPER, "blackwell": gpu.BLACKWELL}
    if GPU and gpu.target_chip() not in chips.get(kernel, gpu.target_chip()):
        pytest.skip("a kernel for another GPU")


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
    skip_unless_for_this_gpu(kernel)
    inputs, d_out, options = make(case)
    learned = {"bias_BHTS": options.pop("bias_BHTS")}
    static = {name: x for name, x in options.items() if not isinstance(x, jax.Array)}
    arrays = {name: x for name, x in options.items() if isinstance(x, jax.Array)}

    def both(inputs, learned, d_out, arrays):
        (out, lse), pull = jax.vjp(lambda x, more: KERNELS[kernel](*x, **static, **arrays, **more), inputs, learned)
        return out, lse, pull((d_out, jnp.zeros_like(lse)))

    got_out, got_lse, (grads, d_learned) = run(kernel, both)(inputs, learned, d_out, arrays)
    out, lse, (wanted_grads, wanted_learned) = wanted(case)
    close(got_out, out, "out")
    np.testing.assert_allclose(got_lse, lse, rtol=1e-5, atol=1e-5)
    for name, grad, want in zip(("dq", "dk", "dv"), grads, wanted_grads, strict=True):
        close(grad, want, name)
    if learned["bias_BHTS"] is not None:
        close(d_learned["bias_BHTS"], wanted_learned["bias_BHTS"], "d bias")


@pytest.mark.slow
@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("case", ["causal", "window both sides", "segments, window", "bias of every head"])
def test_parts_add_up_to_the_gradients_of_the_whole_in_float32(case, monkeypatch):
    """By Triton's kernels, which alone take float32."""
    if not GPU:
        monkeypatch.setattr(gpu, "known_platform", lambda: "cuda")
        monkeypatch.setattr(gpu, "target_chip", lambda: "a100")
    check_parts(case, "gpu", T=150, dtype=jnp.float32, tolerance=3e-6)


@pytest.mark.slow
@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("case", ["causal, grouped, a rest", "segments, sinks, softcap"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_large_scores_and_their_gradients_stay_finite(kernel, case):
    skip_unless_for_this_gpu(kernel)
    (q, k, v), d_out, options = make(case)
    static = {name: x for name, x in options.items() if not isinstance(x, jax.Array)}
    arrays = {name: x for name, x in options.items() if isinstance(x, jax.Array)}

    def both(inputs, d_out, arrays):
        (out, lse), pull = jax.vjp(lambda x: KERNELS[kernel](*x, **static, **arrays), inputs)
        return out, *pull((d_out, jnp.zeros_like(lse)))[0]

    large = q * jnp.bfloat16(1e4), k * jnp.bfloat16(1e4), v
    for x in run(kernel, both)(large, d_out, arrays):
        assert np.isfinite(np.asarray(x, np.float32)).all()


@pytest.mark.parametrize("mask", [{}, {"causal": False}, {"window": 90}, {"q_offset": (300, -150), "window": 150}])
@pytest.mark.parametrize("ids", flash_tpu.IDS)
def test_a_tile_lists_the_blocks_that_its_segments_and_positions_leave(ids, mask):
    T, ids = 600, jnp.asarray(flash_tpu.IDS[ids], jnp.int32)
    x, options = jnp.zeros((2, T, 1, 16)), {"causal": True, "window": None, "q_offset": 0, "scale": 1.0} | mask
    at = np.arange(T)[:, None] + np.reshape(options["q_offset"], (-1, 1, 1)) - np.arange(T)
    sees = (ids[:, :, None] == ids[:, None]) & (ids != 0)[:, None] & (at >= 0 if options["causal"] else True)
    sees = sees if options["window"] is None else sees & (np.abs(at) < options["window"])
    if isinstance(options["q_offset"], tuple):
        options["q_offset"] = jnp.asarray(options["q_offset"], jnp.int32)
    o, arrays = gpu_blocks.options_of(x, x, softcap=None, q_segment_ids_BT=ids, kv_segment_ids_BS=ids, **options)
    given = {"q": jnp.zeros((2, 640, 1, 16)), "k": jnp.zeros((2, 640, 1, 16)), **arrays.padded(640, 640)}
    meet = np.asarray(np.pad(np.asarray(sees), [(0, 0), (0, 40), (0, 40)]).reshape(2, 5, 128, 10, 64).any((2, 4)))
    for of_keys, wanted in ((False, meet), (True, np.swapaxes(meet, 1, 2))):
        lists = np.asarray(gpu_blocks.blocks_met(o, given, 128, 64, of_keys))
        for at in np.ndindex(wanted.shape[:2]):
            n, *blocks = lists[at]
            assert blocks[:n] == list(np.flatnonzero(wanted[at]))


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    "kernel", [pytest.param(name, marks=() if name == "triton" else pytest.mark.slow) for name in KERNELS]
)
def test_blocks_that_nobody_sees_may_hold_anything(kernel):
    """What is not finite would show in anything that is computed of it, even if it were hidden then."""
    skip_unless_for_this_gpu(kernel)
    ids = np.asarray([[1] * 128 + [2] * 128 + [1] * 128], np.int32)
    options = NOTHING | _check_options(
        tuple(jnp.zeros((1, 384, 1, 16)) for _ in range(3)),
        causal=True, window=None, q_offset=0, scale=None, softcap=None, bias_BHTS=None,
        q_segment_ids_BT=jnp.asarray(ids), kv_segment_ids_BS=jnp.asarray(np.where(ids == 2, 5, ids)),
    )  # fmt: skip
    static = {name: x for name, x in options.items() if not isinstance(x, jax.Array)}
    static.pop("bias_BHTS")
    arrays = {name: x for name, x in options.items() if isinstance(x, jax.Array)}
    rng = np.random.default_rng(0)
    q, k, v, d_out = (rng.standard_normal((1, 384, 1, 16)) for _ in range(4))
    bias, poisoned = rng.standard_normal((1, 1, 384, 384)), [k.copy(), v.copy()]
    for x in poisoned:
        x[:, 128:256] = np.nan
    poisoned.append(np.where((np.arange(384) // 128 == 1), np.nan, bias))

    def both(q, k, v, bias, d_out, arrays):
        inputs = [x.astype(jnp.bfloat16) for x in (q, k, v, bias)]
        (out, lse), pull = jax.vjp(
            lambda q, k, v, b: KERNELS[kernel](q, k, v, bias_BHTS=b, **static, **arrays), *inputs
        )
        return out, lse, pull((d_out.astype(out.dtype), jnp.zeros_like(lse)))

    results = [run(kernel, both)(q, *given, d_out, arrays) for given in ((k, v, bias), poisoned)]
    jax.tree.map(np.testing.assert_array_equal, *results)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    ("kernel", "case"),
    [
        pytest.param(*pair, marks=() if pair in QUICK else pytest.mark.slow)
        for pair in itertools.product(KERNELS, FLOAT8)
    ],
)
def test_float8(kernel, case):
    """Its probabilities have 3 bits after the first (bfloat16's 7, where Triton multiplies): 2**-4 of each at most."""
    skip_unless_for_this_gpu(kernel)
    inputs, _, options = make(case)
    inputs, H = tuple(x.astype(jnp.float8_e4m3fn) for x in inputs), inputs[0].shape[2]
    options |= {"qk_scale_H": jnp.linspace(0.5, 2.0, H), "v_scale_H": jnp.linspace(3.0, 1.0, H)}
    static = {name: x for name, x in options.items() if not isinstance(x, jax.Array)}
    arrays = {name: x for name, x in options.items() if isinstance(x, jax.Array)}
    reference = partial(OPERATION.load("reference"), **static)
    out, lse = jax.jit(lambda inputs, arrays: reference(*inputs, **arrays))(inputs, arrays)
    got_out, got_lse = run(kernel, lambda inputs, arrays: KERNELS[kernel](*inputs, **static, **arrays))(inputs, arrays)
    assert got_out.dtype == jnp.bfloat16
    largest = float(jnp.abs(out).max())
    error = np.abs(np.asarray(got_out, np.float64) - np.asarray(out, np.float64))
    assert error.max() <= (2**-7 if kernel == "triton" else 2**-4) * largest
    assert np.sqrt((error**2).mean()) <= 2**-6 * largest
    np.testing.assert_allclose(got_lse, lse, rtol=1e-5, atol=1e-5)


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


def build(target, D, E, B=1, T=512, S=None, H=8, K=4, dtype="bfloat16", bias=None, **options):
    """For `benchmarks.static`: forward and backward, of float8 forward, by the kernels that are chosen for the chip."""
    S = T if S is None else S
    q, k, v = target.array((B, T, H, D), dtype), target.array((B, S, K, D), dtype), target.array((B, S, K, E), dtype)
    given = {}
    if options.pop("segments", False):
        given["q_segment_ids_BT"], given["kv_segment_ids_BS"] = (target.array((B, n), "int32") for n in (T, S))
    if options.pop("sinks", False):
        given["sinks_H"] = target.array((H,), "float32")
    if options.pop("offsets", False):
        given["q_offset"] = target.array((B,), "int32")
    learned = {} if bias is None else {"bias_BHTS": target.array((B, H, T, S), bias)}

    def loss(q, k, v, learned, given):
        return flash_attention(q, k, v, implementation="gpu", **given, **learned, **options).sum()

    return Program(loss if dtype == "float8_e4m3fn" else jax.grad(loss, range(4)), (q, k, v, learned, given), 0.0, 1.0)


SIZES = [*({"D": D, "E": D} for D in (64, 80, 96, 128, 256)), {"D": 192, "E": 128}]
OPTIONS = [
    {},
    {"causal": False},
    {"T": 300, "S": 700},
    {"window": 100},
    {"causal": False, "window": 100, "softcap": 30.0},
    {"segments": True},
    {"segments": True, "window": 100, "softcap": 30.0},
    {"softcap": 30.0},
    {"sinks": True, "window": 128},
    {"offsets": True, "T": 300, "S": 700},
    {"offsets": True, "segments": True, "window": 100, "T": 300, "S": 700, "sinks": True},
    {"bias": "float32"},
    {"bias": "bfloat16", "causal": False},
    {"bias": "float32", "segments": True, "window": 100, "softcap": 30.0, "T": 300, "S": 700},
    {"dtype": "float8_e4m3fn"},
    {"dtype": "float8_e4m3fn", "segments": True, "window": 100, "softcap": 30.0, "T": 300, "S": 700},
    {"dtype": "float8_e4m3fn", "bias": "float32", "causal": False, "sinks": True},
]
LONG = [{"T": 16384, "H": 16, "K": 16}, {"T": 16384, "H": 16, "K": 16, "causal": False}]
COMPILED = [{**size, **options} for size in SIZES for options in OPTIONS] + [
    {"D": 128, "E": 128, **options} for options in LONG
]


@pytest.mark.slow
@pytest.mark.usefixtures("full_compile")
@gpu_programs.all_compile
@pytest.mark.parametrize(
    ("chip", "cases"),
    [
        ("h200", COMPILED),
        ("b200", COMPILED),
        ("a100", [{"D": 128, "E": 128, "segments": True}, {"D": 64, "E": 64, "window": 100, "bias": "float32"}]),
    ],
)
def test_compiles_without_spills_or_serialised_products(chip, cases):
    gpu_programs.check(chip, [(__file__, case) for case in cases])

"""The contract of cross_entropy, for every candidate: values and gradients in float64, over every option.

The reference is held against loops in numpy, every other candidate against the reference.
"""

from functools import partial
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, PartitionSpec

from benchmarks.static import Request, compile_all
from twinax.pallas_kernels.cross_entropy import GRADIENTS, OPERATION, cross_entropy, cross_entropy_and_gradients

CANDIDATES = [name for name in OPERATION.names() if name != "reference"]
ALL = pytest.mark.parametrize("implementation", CANDIDATES)
# The TPU's kernel computes the loss only; XLA its gradients.
WITH_GRADIENTS = pytest.mark.parametrize("implementation", [name for name in CANDIDATES if name != "tpu"])
NAMES = ("loss", "dhidden", "dweight")

# B, T, D, V, options. Chunks: of one token a row, of several with a short last one, all at once.
CASES = {
    "one token": (1, 1, 4, 5, {}),
    "plain": (3, 10, 8, 29, {"chunk_bytes": 3 * 3 * 29 * 4}),
    "one token a chunk": (2, 7, 5, 13, {"chunk_bytes": 0}),
    "scale and softcap": (2, 9, 6, 21, {"scale": 0.7, "softcap": 1.5}),
    "smoothed": (2, 9, 6, 21, {"label_smoothing": 0.2, "chunk_bytes": 2 * 4 * 21 * 4}),
    "z-loss": (2, 9, 6, 21, {"z_loss": 0.05}),
    "z-loss, smoothed": (1, 8, 6, 22, {"z_loss": 0.05, "label_smoothing": 0.1}),
    "softcap, smoothed": (1, 8, 6, 22, {"softcap": 2.0, "label_smoothing": 0.1}),
    "all of it": (2, 10, 8, 30, {"scale": 1.3, "softcap": 3.0, "label_smoothing": 0.1, "z_loss": 0.01}),
    "one word": (1, 3, 4, 1, {"z_loss": 0.5}),
}


def make(case, dtype=np.float64):
    B, T, D, V, options = CASES[case]
    rng = np.random.default_rng(list(CASES).index(case))
    hidden, weight = (rng.normal(size=shape).astype(dtype) for shape in ((B, T, D), (V, D)))
    weights = rng.choice([0.0, 0.5, -1.25], (B, T)).astype(np.promote_types(dtype, np.float32))
    return (hidden, weight, rng.integers(0, V, (B, T)).astype(np.int32), weights), options


def by_hand(hidden, weight, targets, options):
    """The loss of each token, one at a time, from the words of the docstring."""
    loss = np.zeros(targets.shape)
    for at in np.ndindex(*targets.shape):
        logits = weight @ hidden[at] * options.get("scale", 1)
        c, e = options.get("softcap"), options.get("label_smoothing", 0)
        logits = c * np.tanh(logits / c) if c else logits
        lse = logits.max() + np.log(np.exp(logits - logits.max()).sum())
        loss[at] = lse - (1 - e) * logits[targets[at]] - e * logits.mean() + options.get("z_loss", 0) * lse**2
    return loss


def run(arguments, options, implementation):
    """loss, dhidden, dweight [D, V]; of a TPU's candidate, interpreted, only the loss."""
    if implementation == "tpu":
        function = partial(cross_entropy, implementation="tpu", **options)
        with pltpu.force_tpu_interpret_mode():
            return (np.asarray(jax.jit(function)(*arguments[:3])),)
    function = partial(cross_entropy_and_gradients, implementation=implementation, **options)
    return jax.tree.map(np.asarray, jax.jit(function)(*arguments))


def check(got, want, tolerance):
    for name, a, b in zip(NAMES, got, want, strict=False):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * max(1, np.abs(b).max()), err_msg=name)


@pytest.mark.parametrize("case", CASES)
def test_the_reference_does_what_the_docstring_says(case):
    with jax.enable_x64(True):
        (*arguments, weights), options = make(case)
        got = jax.jit(partial(cross_entropy, implementation="reference", **options))(*arguments)
        np.testing.assert_allclose(got, by_hand(*arguments, options), rtol=1e-12, atol=1e-12)
        # A directional derivative of the weighted sum, against a difference.
        rng = np.random.default_rng(0)
        steps = [rng.normal(size=a.shape) for a in arguments[:2]]
        ends = [
            by_hand(*(a + sign * 1e-6 * step for a, step in zip(arguments, steps, strict=False)), arguments[2], options)
            for sign in (1, -1)
        ]
        _, dhidden, dweight = run((*arguments, weights), options, "reference")
        slope = np.sum(dhidden * steps[0]) + np.sum(dweight.T * steps[1])
        np.testing.assert_allclose(slope, np.sum(weights * (ends[0] - ends[1])) / 2e-6, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("case", "implementation"),
    [
        # Interpreting a kernel takes seconds.
        pytest.param(case, name, marks=[pytest.mark.slow] * (name == "tpu" and case not in ("one word", "all of it")))
        for case in CASES
        for name in CANDIDATES
    ],
)
def test_values_and_gradients_are_those_of_the_reference(case, implementation):
    with jax.enable_x64(True):
        wanted = run(*make(case), "reference")
    if implementation == "tpu":  # which has no float64
        check(run(*make(case, np.float32), implementation), wanted, 3e-6)
    else:
        with jax.enable_x64(True):
            check(run(*make(case), implementation), wanted, 1e-12)


@WITH_GRADIENTS
def test_differentiation_gives_the_same_gradients(implementation):
    (hidden, weight, targets, weights), options = make("all of it", np.float32)

    def total(hidden, weight):
        return jnp.sum(weights * cross_entropy(hidden, weight, targets, implementation=implementation, **options))

    got = jax.tree.map(np.asarray, jax.jit(jax.grad(total, argnums=(0, 1)))(hidden, weight))
    want = run((hidden, weight, targets, weights), options, implementation)
    np.testing.assert_array_equal(got[0], want[1])
    np.testing.assert_array_equal(got[1], want[2].T)


@ALL
def test_bfloat16_products_with_float32_sums(implementation):
    (*arguments, weights), options = make("all of it")
    hidden, weight = (jnp.asarray(a, jnp.bfloat16) for a in arguments[:2])
    got = run((hidden, weight, arguments[2], weights.astype(np.float32)), options, implementation)
    with jax.enable_x64(True):
        rounded = (np.asarray(hidden, np.float64), np.asarray(weight, np.float64), arguments[2], weights)
        want = run(rounded, options, "reference")
    assert got[0].dtype == jnp.float32
    np.testing.assert_allclose(got[0], want[0], rtol=1e-6, atol=2e-6)  # products of bfloat16 are exact in float32
    if implementation != "tpu":
        assert (got[1].dtype, got[2].dtype) == (jnp.bfloat16, jnp.float32)
        # The gradients of logits are rounded to bfloat16, 2**-9 each.
        assert np.linalg.norm(got[1].astype(np.float64) - want[1]) <= 2**-7.5 * np.linalg.norm(want[1])
        assert np.linalg.norm(got[2] - want[2]) <= 2**-8 * np.linalg.norm(want[2])


def test_a_tpu_kernel_with_several_blocks_of_every_kind(monkeypatch):
    """Tokens and words are cut, the last blocks reach beyond the arrays, a block has several pieces."""
    from twinax.pallas_kernels.cross_entropy import tpu

    monkeypatch.setattr(tpu, "TOKENS", 32)
    monkeypatch.setattr(tpu, "WORDS", 256)
    monkeypatch.setattr(tpu, "PIECE", (16, 128))
    rng = np.random.default_rng(5)
    hidden, weight = rng.normal(size=(2, 20, 24)), rng.normal(size=(700, 24))
    hidden, weight = (jnp.asarray(a, jnp.bfloat16) for a in (hidden, weight))
    targets = rng.integers(0, 700, (2, 20)).astype(np.int32)
    options = {"label_smoothing": 0.1, "z_loss": 0.1}
    (got,) = run((hidden, weight, targets), options, "tpu")
    want = by_hand(np.asarray(hidden, np.float64), np.asarray(weight, np.float64), targets, options)
    np.testing.assert_allclose(got, want, rtol=2e-6)


def test_a_tpu_leaves_gradients_to_xla():
    (*arguments, weights), _ = make("plain", np.float32)
    with pytest.raises(NotImplementedError, match="compute the logits twice"):
        cross_entropy_and_gradients(*arguments, weights, implementation="tpu")


@pytest.mark.parametrize("implementation", [name for name in OPERATION.names() if name != "tpu"])
@pytest.mark.parametrize("case", ["plain", "all of it"])
def test_a_vocabulary_over_two_axes_of_a_mesh_is_that_of_one_device(case, implementation):
    devices = np.asarray(jax.devices()[:4]).reshape(2, 2)
    mesh, spec = Mesh(devices, ("a", "b")), PartitionSpec(("a", "b"))
    with jax.enable_x64(True):
        (hidden, weight, targets, weights), options = make(case)
        weight = np.concatenate([weight, weight[: -len(weight) % 4] + 0.1])
        want = run((hidden, weight, targets, weights), options, "reference")

        def local(hidden, weight, targets, weights):
            loss, dhidden, dweight = cross_entropy_and_gradients(
                hidden, weight, targets, weights, axis=("a", "b"), implementation=implementation, **options
            )
            return loss, jax.lax.psum(dhidden, ("a", "b")), dweight

        function = jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(PartitionSpec(), spec, PartitionSpec(), PartitionSpec()),
            out_specs=(PartitionSpec(), PartitionSpec(), PartitionSpec(None, ("a", "b"))),
            check_vma=False,
        )
        check(jax.tree.map(np.asarray, jax.jit(function)(hidden, weight, targets, weights)), want, 1e-12)

        def loss(hidden, weight):
            return cross_entropy(hidden, weight, targets, axis=("a", "b"), implementation=implementation, **options)

        whole = jax.shard_map(
            loss, mesh=mesh, in_specs=(PartitionSpec(), spec), out_specs=PartitionSpec(), check_vma=False
        )
        np.testing.assert_allclose(jax.jit(whole)(hidden, weight), want[0], rtol=1e-12)
        with pytest.raises(NotImplementedError, match="use cross_entropy_and_gradients"):
            jax.grad(lambda h: jnp.sum(whole(h, weight)))(hidden)


@pytest.mark.parametrize("implementation", [*CANDIDATES, "reference"])
def test_tokens_of_weight_0_and_huge_logits(implementation):
    (hidden, weight, targets, weights), _ = make("plain", np.float32)
    targets[0], weights[0], weights[1:] = [-100, *range(1000, 1009)], 0, 1
    loss, *gradients = run((hidden * 1e4, weight, targets, weights), {}, implementation)
    assert np.isfinite(loss[1:]).all()
    for gradient in gradients:
        assert np.isfinite(gradient).all()
    if gradients:
        assert not np.any(gradients[0][0])
        targets[0], hidden[0] = 3, np.inf
        for a, b in zip(run((hidden * 1e4, weight, targets, weights), {}, implementation)[1:], gradients, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_BTD": np.zeros((2, 3, 5), np.float32)}, r"hidden \[B, T, D\] and weight \[V, D\]"),
        ({"weight_VD": np.zeros((7, 4), np.float16)}, "one floating dtype, got float32 and float16"),
        ({"targets_BT": np.zeros((2, 3), np.float32)}, "an integer a token"),
        ({"softcap": 0.0}, "softcap must be positive, got 0.0"),
        ({"label_smoothing": 1.0}, "from 0 up to below 1, got 1.0"),
        ({"z_loss": -1.0}, "a number from 0 up, got -1.0"),
    ],
)
def test_what_breaks_a_rule_is_refused(change, message):
    arguments = {
        "hidden_BTD": np.zeros((2, 3, 4), np.float32),
        "weight_VD": np.zeros((7, 4), np.float32),
        "targets_BT": np.zeros((2, 3), np.int32),
    }
    with pytest.raises(ValueError, match=message):
        cross_entropy(**(arguments | change))


def test_both_operations_have_the_same_candidates():
    assert OPERATION.names() == GRADIENTS.names()
    for name in OPERATION.names():
        assert OPERATION.load(name)
        assert GRADIENTS.load(name)


def program(target, N, D, V, dtype, options):
    """Called in the compiler's process."""
    from benchmarks.static import Program

    def loss(hidden, weight, targets):
        return cross_entropy(hidden, weight, targets, implementation="tpu", **options)

    arrays = target.array((1, N, D), dtype), target.array((V, D), dtype), target.array((1, N), "int32")
    return Program(loss, arrays, 0.0, 0.0)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize("chip", ["v5p", "7x"])
def test_it_compiles(chip):
    """Sizes that fill no registers, several pieces and blocks, float32, and the widest states that are taken."""
    everything = {"scale": 0.5, "softcap": 30.0, "label_smoothing": 0.1, "z_loss": 1e-4}
    kinds = [
        {"N": 5, "D": 72, "V": 301, "dtype": "bfloat16", "options": everything},
        {"N": 1500, "D": 128, "V": 1000, "dtype": "bfloat16", "options": {}},
        {"N": 600, "D": 128, "V": 500, "dtype": "float32", "options": {}},
        {"N": 2048, "D": 8192, "V": 2000, "dtype": "bfloat16", "options": everything},
        {"N": 600, "D": 4096, "V": 2000, "dtype": "float32", "options": {}},
    ]
    found = compile_all([Request(chip, f"{__file__}:program", kind) for kind in kinds], profiled=False)
    assert [x.failed for x in found] == [None] * len(kinds)

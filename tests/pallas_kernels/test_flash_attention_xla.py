"""What flash_attention's XLA candidate promises beyond the contract: its program's shapes, its work and its memory."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from twinax.pallas_kernels.flash_attention import flash_attention, xla

PROGRAMS = {
    "short tiles": {"UNROLL": 10**9, "BACKWARD_CHUNK": 1},
    "long tiles by groups": {
        "UNROLL": 10**9,
        "FORWARD_CHUNK": 3,
        "BACKWARD_CHUNK": 3,
        "TILE_BYTES": 2 * 2 * 96 * 16 * 4,
    },
    "loops": {"UNROLL": 0, "TILE_BYTES": 10**9},
    "loops by groups": {"UNROLL": 0, "TILE_BYTES": 1},
}


def step(implementation="xla", **options):
    """Loss and gradients of a function of out and lse."""

    def loss(q, k, v):
        out, lse = flash_attention(q, k, v, return_lse=True, implementation=implementation, **options)
        return (out**2).sum() + jnp.where(lse > -jnp.inf, lse, 0).sum()

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))


def shapes(T, B=2, H=2, K=1, D=16):
    return [jax.ShapeDtypeStruct((B, T, heads, D), jnp.float32) for heads in (H, K, K)]


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_shape_of_the_program_means_the_same(program, monkeypatch):
    rng = np.random.default_rng(0)
    monkeypatch.setattr(xla, "BLOCK", 16)
    for name, value in PROGRAMS[program].items():
        monkeypatch.setattr(xla, name, value)
    with jax.enable_x64(True):
        inputs = [jnp.asarray(rng.standard_normal((4, 37, heads, 4))) for heads in (4, 2, 2)]
        ids = jnp.asarray(np.sort(rng.integers(0, 3, (4, 37)), axis=1))
        options = {"window": 15, "softcap": 2.0, "q_segment_ids_BT": ids, "q_offset": 1}
        wanted = step("reference", **options)(*inputs)
        got = step(**options)(*inputs)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-12), got, wanted)


@pytest.mark.parametrize(("options", "share"), [({}, 0.65), ({"window": 100}, 0.5)], ids=["causal", "window"])
def test_work_falls_with_the_blocks_that_the_mask_empties(options, share):
    """With 4 x 4 blocks, causality leaves 10 of 16 and a window of 100 leaves 7."""
    flops = [
        step(**options).lower(*shapes(512, D=64)).cost_analysis()["flops"] for options in (options, {"causal": False})
    ]
    assert flops[0] < share * flops[1]


def test_memory_does_not_grow_with_the_square_of_the_length():
    """A T x T matrix would take four times the memory for twice the length."""
    kilobytes = [step().lower(*shapes(T)).compile().memory_analysis().temp_size_in_bytes / 1024 for T in (1024, 2048)]
    assert kilobytes[1] < 2.2 * kilobytes[0]
    assert kilobytes[1] < 4 * 2048 * 2048 / 1024  # of a single head's matrix, where there are four


def test_no_score_outlives_its_tile_in_what_the_backward_pass_keeps():
    """The residuals are the inputs, the output and one number a row."""
    attend = partial(flash_attention, implementation="xla")
    pullback = jax.eval_shape(lambda *inputs: jax.vjp(attend, *inputs)[1], *shapes(256))
    assert 0 < max(x.size for x in jax.tree.leaves(pullback)) <= 2 * 256 * 2 * 16


def test_under_vmap_and_remat():
    rng = np.random.default_rng(0)
    inputs = [jnp.asarray(rng.standard_normal((3, 2, 9, heads, 4)), jnp.float32) for heads in (2, 1, 1)]

    def loss(q, k, v):
        return (flash_attention(q, k, v, implementation="xla") ** 2).sum()

    one = jax.jit(jax.grad(jax.checkpoint(loss), (0, 1, 2)))
    wanted = jax.tree.map(lambda *x: jnp.stack(x), *(one(*(x[i] for x in inputs)) for i in range(3)))
    got = jax.jit(jax.vmap(jax.grad(loss, (0, 1, 2))))(*inputs)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), got, wanted)

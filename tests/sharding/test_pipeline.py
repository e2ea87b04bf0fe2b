"""Pipelines: every order gives the results, sums and gradients of running the layers one after another, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.thorough import thorough
from twinax.sharding import pipeline
from twinax.sharding.plan import Plan
from twinax.sharding.rules import use

L, B, T, D = 8, 16, 4, 6
AXES = {"w": ("mlp", "embed"), "b": ("embed",)}


def weights():
    rng = np.random.default_rng(0)
    return {"w": rng.normal(size=(L, D, D)) / D**0.5, "b": rng.normal(size=(L, D))}, {"in": rng.normal(size=(5, D))}


def rows():
    rng = np.random.default_rng(1)
    return {"tokens": rng.integers(0, 5, (B, T)), "shift": rng.normal(size=(B, T)), "want": rng.normal(size=(B, T))}


def layer(weight, x, piece):
    y = x + jnp.tanh(x @ weight["w"] + weight["b"]) * piece["shift"][..., None]
    return y, {"total": jnp.sum(y), "squares": jnp.sum(y**2, axis=(0, 1))}


def stage(weights_l, x, piece):
    return jax.lax.scan(lambda x, weight: layer(weight, x, piece), x, weights_l)


def enter(outside, piece):
    return jnp.asarray(outside["in"])[piece["tokens"]]


def leave(outside, x, piece):
    errors = (x @ outside["in"].T).sum(-1) - piece["want"]
    return jnp.sum(errors**2), {"rows": jnp.asarray(float(len(x)))}


def importance(sums):
    """A part of the loss that depends on the layers' sums."""
    return sum(jnp.sum(jnp.arange(1.0, L + 1) @ array.reshape(L, -1)) for array in sums.values()) * 1e-2


def plain(outside, weights_L, batch):
    x, sums = stage(weights_L, enter(outside, batch), batch)
    loss, _ = leave(outside, x, batch)
    return loss + importance(sums), (x, sums)


def check(got, want, places=1e-11):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=places, atol=places), got, want)


@pytest.mark.parametrize(
    ("plan", "pieces", "rounds"),
    thorough(
        [
            ("stage=4", 8, 1),
            ("stage=2,fsdp=2,tensor=2", 4, 1),
            ("stage=4", 8, 2),
            ("stage=2", 2, 1),
            ("stage=8", 4, 1),
            ("stage=4", 1, 1),
            ("stage=2", 4, 2),
            ("stage=2,data=2", 2, 4),
        ],
        3,
    ),
)
def test_gpipe_and_interleaved(plan, pieces, rounds):
    plan = Plan.parse(plan)

    def piped(outside, weights_L, batch):
        cut = pipeline.cut(batch, pieces)
        x_M = jax.vmap(lambda piece: enter(outside, piece))(cut)
        x_M, sums = pipeline.run(stage, weights_L, AXES, x_M, cut, stages=plan.stage, rounds=rounds)
        x = pipeline.join(x_M)
        return leave(outside, x, batch)[0] + importance(sums), (x, sums)

    with jax.enable_x64(True):
        weights_L, outside = weights()
        want = jax.value_and_grad(plain, (0, 1), has_aux=True)(outside, weights_L, rows())
        with use(plan.mesh()):
            run = jax.jit(jax.value_and_grad(piped, (0, 1), has_aux=True))
            got = run(outside, weights_L, rows())
    check(got, want)


@pytest.mark.parametrize(
    ("plan", "pieces"),
    [("stage=2", 2), ("stage=4", 8), ("stage=8", 4), ("stage=4", 1), ("stage=2", 16), ("stage=2,fsdp=2,tensor=2", 4)],
)
def test_1f1b(plan, pieces):
    plan = Plan.parse(plan)

    def piped(outside, weights_L, batch):
        cut = pipeline.cut(batch, pieces)
        return pipeline.run_1f1b(enter, stage, leave, outside, weights_L, AXES, cut, importance, stages=plan.stage)

    with jax.enable_x64(True):
        weights_L, outside = weights()
        (loss, (_, sums)), (doutside, dweights) = jax.value_and_grad(plain, (0, 1), has_aux=True)(
            outside, weights_L, rows()
        )
        with use(plan.mesh()):
            (got_loss, others), *got = jax.jit(piped)(outside, weights_L, rows())
        got_loss += importance(got[0])
    assert others["rows"] == B
    check((got_loss, *got), (loss, sums, doutside, dweights))


def test_1f1b_keeps_as_much_for_many_pieces_as_for_few():
    def temporary(pieces, run):
        plan = Plan(stage=2)
        batch = {"tokens": np.zeros((pieces * 64, 64), int), "shift": np.ones((pieces * 64, 64))}
        batch["want"] = batch["shift"]
        with use(plan.mesh()):
            return jax.jit(run).lower(weights()[1], weights()[0], batch).compile().memory_analysis().temp_size_in_bytes

    def one_by_one(outside, weights_L, batch):
        cut = pipeline.cut(batch, len(batch["tokens"]) // 64)
        return pipeline.run_1f1b(enter, stage, leave, outside, weights_L, AXES, cut, stages=2)

    # The batch itself is cut into pieces, 12 bytes a token. GPipe would keep 24 pieces more, for every layer.
    batch, one_piece = 24 * 64 * 64 * 12, 64 * 64 * D * 4
    assert temporary(32, one_by_one) - temporary(8, one_by_one) - batch < one_piece


def test_what_cannot_be_cut_is_an_error():
    weights_L, outside = weights()
    cut = pipeline.cut(rows(), 2)
    x_M = jax.vmap(lambda piece: enter(outside, piece))(cut)
    with pytest.raises(ValueError, match="stage x rounds = 3; 2 are left over"):
        pipeline.run(stage, weights_L, AXES, x_M, cut, stages=3)
    with pytest.raises(ValueError, match="4 at a time, one a stage; got 2 pieces"):
        pipeline.run(stage, weights_L, AXES, x_M, cut, stages=4, rounds=2)

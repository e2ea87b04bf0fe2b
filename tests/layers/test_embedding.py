"""The embedding on a mesh: the rows of the table and their gradient, in pieces, with nothing whole on any device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from twinax.layers import embedding
from twinax.layers.embedding import Embedding
from twinax.planner.hlo import Module
from twinax.sharding.plan import Plan
from twinax.sharding.rules import use

V, D, B, T = 24, 32, 8, 8
PLANS = ["fsdp=4", "fsdp=2,tensor=2", "expert=2,sequence=2,data=2", "sequence=2,tensor=4", "fsdp=2,stage=2"]


def table(dtype=jnp.float64) -> Embedding:
    return Embedding(V, D, param_dtype=dtype, rngs=nnx.Rngs(0))


def run(plan: Plan, dtype, tokens, d_out):
    """The embeddings, and the gradient of the table in its dtype."""
    definition, state = nnx.split(table())
    mesh = plan.mesh()
    state, tokens, d_out = jax.device_put((state, tokens, d_out.astype(dtype)), jax.NamedSharding(mesh, jax.P()))

    def look_up(state, tokens):
        return nnx.merge(definition, state)(tokens, dtype)

    def both(state, tokens, d_out):
        with use(mesh):
            out, pullback = jax.vjp(lambda state: look_up(state, tokens), state)
            return out, pullback(d_out)[0]["weight"][...]

    return jax.jit(both)(state, tokens, d_out)


@pytest.mark.parametrize("pieces", [1, 2, 8])
@pytest.mark.parametrize("plan", PLANS)
def test_it_is_the_rows_of_the_table_and_its_gradient_their_sum(plan, pieces, monkeypatch):
    plan, random = Plan.parse(plan), np.random.default_rng(0)
    tokens = random.integers(0, V, (B, T)).astype(np.int32)
    tokens[:, 0] = 3  # a token that every device has
    monkeypatch.setattr(embedding, "PIECE_BYTES", V // plan.tensor * D * 8 // pieces)
    with jax.enable_x64(True):
        d_out = random.standard_normal((B, T, D))
        out, d_weight = run(plan, jnp.float64, tokens, d_out)
        weight = np.asarray(table().weight[...])
    np.testing.assert_array_equal(out, weight[tokens])
    want = np.zeros((V, D))
    np.add.at(want, tokens, d_out)
    np.testing.assert_allclose(d_weight, want, rtol=1e-12, atol=1e-12)


def test_narrow_embeddings_have_a_wide_gradient():
    """Each element of the table's gradient is a sum in its own dtype of what is rounded to the embeddings'."""
    tokens = np.full((B, T), 5, np.int32)
    d_out = np.ones((B, T, D), jnp.bfloat16) * 1.0078125
    with jax.enable_x64(True):
        out, d_weight = run(Plan(fsdp=4), jnp.bfloat16, tokens, d_out)
        weight = np.asarray(table().weight[...])
    np.testing.assert_array_equal(out, weight[tokens].astype(jnp.bfloat16))
    assert d_weight.dtype == np.float64
    np.testing.assert_array_equal(d_weight[5], B * T * 1.0078125)
    assert not np.delete(np.asarray(d_weight), 5, axis=0).any()


def test_no_device_holds_more_than_a_piece(monkeypatch):
    """Of the table, whose rows are many here; in the compiled program, forward and backward."""
    rows = 4096
    monkeypatch.setattr(embedding, "PIECE_BYTES", rows * D * 4 // 4)
    definition, state = nnx.split(jax.eval_shape(lambda: Embedding(rows, D, rngs=nnx.Rngs(0))))
    mesh = Plan(fsdp=4).mesh()
    place = jax.NamedSharding(mesh, jax.P(None, "fsdp"))
    state = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), state)
    tokens = jax.ShapeDtypeStruct((B, T), jnp.int32, sharding=jax.NamedSharding(mesh, jax.P("fsdp")))

    def loss(state, tokens):
        with use(mesh):
            return jnp.sum(nnx.merge(definition, state)(tokens, jnp.float32) ** 2)

    module = Module.parse(jax.jit(jax.grad(loss)).lower(state, tokens).compile().as_text())
    largest = max(
        int(np.prod(shape.dims))
        for computation in module.computations.values()
        for instruction in computation
        for shape in instruction.shapes
    )
    assert largest == rows * D // 4

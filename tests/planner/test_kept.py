"""What the backward pass keeps: the coefficients read off a toy, against JAX's derivative of another model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from twinax.layers.contexts import PackedContext
from twinax.layers.moe_config import MoEConfig
from twinax.models.config import DecoderConfig
from twinax.models.decoder import functional, param_shapes
from twinax.planner.kept import kept_of
from twinax.sharding.plan import Plan
from twinax.sharding.rules import use

LAYERS, ROWS, LENGTH = 2, 4, 31  # a prime that divides no width: what it divides counts tokens


def kept_by_jax(config: DecoderConfig, remat: str, dtype: str, plan: Plan) -> int:
    """Bytes of all arrays [L, ...] with tokens that the derivative of the hidden states keeps."""
    model = functional(config, dtype=jnp.dtype(dtype), remat=remat)

    def pull(params, tokens_BT):
        context = PackedContext(jnp.ones_like(tokens_BT), jnp.zeros_like(tokens_BT))
        return jax.vjp(lambda params: model.hidden(params, tokens_BT, context)[0], params)[1]

    with use(plan.mesh() if plan.devices > 1 else None):
        leaves = jax.tree.leaves(
            jax.eval_shape(pull, param_shapes(config), jax.ShapeDtypeStruct((ROWS, LENGTH), np.int32))
        )
    stacked = [leaf for leaf in leaves if leaf.shape[:1] == (LAYERS,)]
    return sum(leaf.dtype.itemsize * leaf.size for leaf in stacked if any(size % LENGTH == 0 for size in leaf.shape))


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_toy_foretells_another_model(remat: str, dtype: str):
    config = DecoderConfig(
        vocab_size=64, hidden_size=48, intermediate_size=112, num_layers=LAYERS, num_heads=6, num_kv_heads=2,
        head_dim=20, max_position_embeddings=LENGTH,
    )  # fmt: skip
    kept = kept_of(remat, dtype)
    token = kept.width * 48 + kept.mlp * 112 + kept.heads * 6 * 20 + kept.kv_heads * 2 * 20 + kept.single
    expected = LAYERS * ROWS * LENGTH * token
    # What there is one number of for each head and token is a few bytes in a thousand; the toy has other heads.
    assert kept_by_jax(config, remat, dtype, Plan(fsdp=2)) == pytest.approx(expected, rel=0.02)


def test_full_remat_keeps_what_enters_a_block_and_nothing_else():
    for has_experts in (False, True):
        kept = kept_of("full", "bfloat16", has_experts)
        assert (kept.width, kept.mlp, kept.heads, kept.kv_heads, kept.single) == (2, 0, 0, 0, 0)
        assert kept_of("full", "float32", has_experts).width == 4


def test_less_is_kept_the_more_is_computed_again():
    none, dots, full = (kept_of(remat, "bfloat16", True) for remat in ("none", "dots", "full"))
    assert none.mlp > dots.mlp > full.mlp == 0
    assert none.width > dots.width >= full.width


def test_what_tensor_parallelism_leaves_whole():
    """The inputs of products; of a mixture, those of the router in float32 and each expert's rows."""
    dense, mixture = (kept_of("none", "bfloat16", has_experts) for has_experts in (False, True))
    assert (dense.whole, dense.routed) == (2 + 2, 0)
    assert (mixture.whole, mixture.routed) == (2 + 4, 2)
    for remat in ("dots", "full"):
        for has_experts in (False, True):
            kept = kept_of(remat, "bfloat16", has_experts)
            assert (kept.whole, kept.routed) == (0, 0)


def test_experts_keep_more_than_a_dense_layer():
    config = DecoderConfig(
        vocab_size=64, hidden_size=48, intermediate_size=8, num_layers=LAYERS, num_heads=6, num_kv_heads=2, head_dim=20,
        max_position_embeddings=LENGTH, moe=MoEConfig(num_experts=4, experts_per_token=1, expert_size=112),
    )  # fmt: skip
    kept = kept_of("none", "bfloat16", True)
    token = (kept.width + kept.routed) * 48 + kept.mlp * 112 + kept.single
    token += kept.heads * 6 * 20 + kept.kv_heads * 2 * 20
    expected = LAYERS * ROWS * LENGTH * token
    assert kept_by_jax(config, "none", "bfloat16", Plan(fsdp=2)) == pytest.approx(expected, rel=0.03)

"""Whether a plan fits a model and a batch: every refusal is a real one, and the nearest plan is the best there is."""

import itertools
import math
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from twinax.layers.contexts import PackedContext
from twinax.layers.mixer_config import LatentAttentionConfig, LightningConfig, Mamba2Config
from twinax.layers.moe_config import MoEConfig
from twinax.models.config import DecoderConfig, LayerKind
from twinax.models.decoder import functional, param_axes, param_shapes
from twinax.sharding.plan import AXES, CHOICES, Plan, PlanError
from twinax.sharding.rules import (
    ACTIVATION_RULES,
    COMPUTE_RULES,
    PARAMETER_RULES,
    parameter_sharding,
    partition_spec,
    use,
)

SIZES = {"embed": 24, "heads": 6, "kv_heads": 2, "mlp": 36, "vocab": 64, "layers": 6, "rows": 12, "tokens": 24}


def test_parse_reads_what_str_writes_for_every_part():
    whole = Plan(2, 3, 2, 2, 1, 4, attention="ring_two_way", schedule="interleaved", microbatches=8, rounds=2)
    assert Plan.parse(str(whole)) == whole
    assert whole.devices == 2 * 3 * 2 * 2 * 4 and whole.pieces == 8
    assert Plan(stage=4).pieces == 8 and Plan(microbatches=8).pieces == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("attention=rong", "ring, ring_two_way, all_to_all; got 'rong'"),
        ("schedule=1f2b", "gpipe, 1f1b, interleaved; got '1f2b'"),
        ("stage=2,rounds=2", "rounds=2 is for schedule=interleaved; the schedule is gpipe"),
        ("tensr=2", "Did you mean 'tensor'"),
        ("microbatches=-1", "whole number"),
    ],
)
def test_a_wrong_part_names_the_right_ones(text, message):
    with pytest.raises(PlanError, match=message):
        Plan.parse(text)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ("tensor=4", r"heads of 6 cannot be cut over tensor = 4; kv_heads of 2 cannot"),
        ("sequence=2,attention=all_to_all,tensor=2", r"heads of 6 cannot be cut over tensor x sequence .* = 4"),
        ("sequence=8", r"tokens of 24 cannot be cut over 2 \(zigzag order\) x sequence x tensor = 16"),
        ("stage=4", r"layers of 6 cannot be cut over stage x rounds = 4"),
        ("fsdp=8", r"rows of 12 cannot be cut over data x fsdp x expert x microbatches = 8"),
    ],
)
def test_a_refusal_names_axis_and_size_and_the_nearest_plan(plan, message):
    with pytest.raises(PlanError, match=message + r".*The nearest plan that works is "):
        Plan.parse(plan).check(SIZES)


def test_experts_need_a_mixture():
    with pytest.raises(PlanError, match="expert=2 needs a mixture of experts"):
        Plan(expert=2).check({**SIZES, "experts": 0})
    Plan(expert=2).check({**SIZES, "experts": 4, "embed": 32})


@given(st.sampled_from([1, 2, 4, 6, 8]), st.data())
def test_the_nearest_plan_fits_and_none_is_nearer(devices, data):
    sizes = {
        name: data.draw(st.sampled_from([2, 4, 6, 8, 12, 24]), label=name)
        for name in ("embed", "heads", "kv_heads", "mlp", "vocab", "layers", "rows", "tokens")
    } | {"experts": 0}
    plan = data.draw(st.sampled_from(list(Plan().variants(devices))))
    near = plan.nearest(sizes)
    assert near is not None and not near.problems(sizes)
    if not plan.problems(sizes):
        assert near == plan

    def far(other):
        return sum(abs(math.log2(plan.sizes[a] / other.sizes[a])) for a in AXES)

    for other in plan.variants(near.devices):
        assert other.problems(sizes) or far(other) >= far(near) - 1e-9
    # On fewer devices only if there is none on all of them.
    if near.devices < devices:
        assert all(other.problems(sizes) for other in plan.variants(devices))


def test_variants_are_all_ways_of_dividing():
    found = [tuple(plan.sizes.values()) for plan in Plan().variants(8)]
    every = [sizes for sizes in itertools.product([1, 2, 4, 8], repeat=6) if math.prod(sizes) == 8]
    assert sorted(found) == sorted(every)


@pytest.mark.parametrize("plan", list(Plan().variants(8)), ids=str)
def test_what_a_plan_accepts_can_be_placed(plan):
    """No plan that `problems` lets through fails later, in a rule, with a collision or an indivisible size."""
    config = DecoderConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_layers=8, num_heads=8, num_kv_heads=8, head_dim=4,
        max_position_embeddings=64,
    )  # fmt: skip
    if plan.problems(config.dimensions):
        assert plan.expert > 1
        return
    mesh, shapes = plan.mesh(), param_shapes(config)
    for name, axes in param_axes(config).items():
        cut = parameter_sharding(axes, mesh, shapes[name].shape).shard_shape(shapes[name].shape)
        assert math.prod(cut) * plan.devices >= math.prod(shapes[name].shape)
        partition_spec(axes[-1:], mesh, COMPUTE_RULES, shapes[name].shape[-1:])


LATENT = LayerKind(mixer="latent_attention")
UNLIKE = {
    "windows but in every third layer": {"pattern": (*[LayerKind(window=4)] * 2, LayerKind()), "num_layers": 6},
    "a cut pattern": {"pattern": (LayerKind(window=4), LayerKind(), LayerKind())},
    "a dense layer first": {
        "pattern": (LayerKind(feed_forward="mlp"), *[LayerKind()] * 7),
        "moe": MoEConfig(num_experts=4, experts_per_token=2, expert_size=16, shared_experts=1),
        "intermediate_size": 98,
    },
    "small latents": {
        "pattern": (LATENT,),
        "latent": LatentAttentionConfig(query_rank=12, kv_rank=8, nope_dim=2, rope_dim=2, value_dim=4),
    },
    "Mamba-2 and attention": {
        "pattern": (LayerKind(mixer="mamba2", rope=None, feed_forward=None), LayerKind()),
        "mamba2": Mamba2Config(num_heads=8, head_dim=4, state_size=6, groups=2),
    },
    "lightning attention": {
        "pattern": (LayerKind(mixer="lightning_attention", rope=None),),
        "lightning": LightningConfig(num_heads=4, head_dim=8),
    },
}


@pytest.mark.parametrize("name", UNLIKE)
def test_of_layers_that_differ_plans_are_refused_where_the_model_would_and_nowhere_else(name):
    """What `problems` says is what comes of placing the parameters and tracing the model."""
    config = DecoderConfig(
        **{
            "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_layers": 8, "num_heads": 8,
            "num_kv_heads": 8, "head_dim": 4, "max_position_embeddings": 32, **UNLIKE[name],
        }
    )  # fmt: skip
    shapes, tokens = param_shapes(config), jnp.zeros((8, 32), jnp.int32)
    context, refused, traced = PackedContext(jnp.ones_like(tokens), tokens), 0, 0
    for devices in (2, 4, 8):
        for plan in Plan(microbatches=1).variants(devices):
            problems = plan.problems({**config.dimensions, "rows": 8, "tokens": 32})
            # Of what only `problems` knows, and what brings nothing new here.
            if any("needs a mixture" in one or "keep a state" in one for one in problems) or plan.data > 1:
                continue
            fails = None
            try:
                with use(mesh := plan.mesh()):
                    for parameter, axes in param_axes(config).items():
                        parameter_sharding(axes, mesh, shapes[parameter].shape)
                    if plan.stage > 1 or devices == 2:
                        model = functional(config)
                        jax.eval_shape(partial(model.hidden, plan=plan), shapes, tokens, context)
                        traced += 1
            except ValueError as error:
                fails = error
                refused += 1
            assert problems if fails else not problems or plan.stage == 1, f"{plan}: {problems}, {fails}"
    assert traced and refused


def test_the_rules_name_mesh_axes_and_no_activation_collides():
    for rules in (PARAMETER_RULES, COMPUTE_RULES, ACTIVATION_RULES):
        assert {axis for axes in rules.values() for axis in axes} <= set(AXES)
    mesh = Plan(stage=2, sequence=2, tensor=2).mesh()
    for axes in (("stage", "batch", "sequence", "embed"), ("batch", "tokens", "heads", None)):
        partition_spec(axes, mesh, ACTIVATION_RULES)
    with pytest.raises(ValueError, match="would cut both 'sequence' and 'heads'"):
        partition_spec(("sequence", "heads"), mesh, ACTIVATION_RULES)
    assert set(CHOICES) <= {field for field in Plan.__dataclass_fields__}
    assert len(jax.devices()) == 8

"""The decoder: its parts agree with each other, with a plain float64 Llama, and with themselves on a mesh."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.thorough import thorough
from twinax.layers.contexts import PackedContext
from twinax.layers.moe_config import MoEConfig
from twinax.models.config import DecoderConfig, LayerKind
from twinax.models.decoder import (
    Decoder,
    check_params,
    functional,
    init_params,
    param_axes,
    param_shapes,
    param_shardings,
    split_layers,
)
from twinax.sharding.plan import Plan
from twinax.sharding.rules import use

TINY = DecoderConfig(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_position_embeddings=64,
)
VARIANTS = [TINY, dataclasses.replace(TINY, tie_embeddings=True, attention_bias=True, mlp_bias=True)]


def noisy_params(config: DecoderConfig) -> dict[str, np.ndarray]:
    """Parameters without a zero or a one in them, so that a bias or a norm left out shows."""
    rng = np.random.default_rng(3)
    shapes = param_shapes(config)
    return {name: 0.3 * rng.standard_normal(shape.shape) + 0.1 for name, shape in shapes.items()}


def packed(lengths: list[int], total: int) -> PackedContext:
    segments = np.zeros((1, total), np.int32)
    positions = np.zeros((1, total), np.int32)
    start = 0
    for number, length in enumerate(lengths, 1):
        segments[0, start : start + length] = number
        positions[0, start : start + length] = np.arange(length)
        start += length
    return PackedContext(jnp.asarray(segments), jnp.asarray(positions))


def plain_llama(config: DecoderConfig, params: dict[str, np.ndarray], tokens: np.ndarray) -> np.ndarray:
    """Logits [T, V] of one sequence in float64, written from the paper's formulas with numpy alone."""

    def norm(x, weight):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps) * weight

    def project(x, name, layer):
        bias = params.get(f"{name}.bias")
        return x @ params[f"{name}.weight"][layer].T + (0 if bias is None else bias[layer])

    length, size = len(tokens), config.head_dim
    turn = np.exp(1j * np.outer(np.arange(length), config.rope.theta ** -(np.arange(0, size, 2) / size)))[:, None]

    def rope(x):
        z = (x[..., : size // 2] + 1j * x[..., size // 2 :]) * turn
        return np.concatenate([z.real, z.imag], -1)

    x = params["embed.weight"][tokens]
    group = config.num_heads // config.num_kv_heads
    for layer in range(config.num_layers):
        h = norm(x, params["blocks.attention_norm.weight"][layer])
        q = rope(project(h, "blocks.attention.query", layer).reshape(length, -1, size))
        k = rope(project(h, "blocks.attention.key", layer).reshape(length, -1, size)).repeat(group, 1)
        v = project(h, "blocks.attention.value", layer).reshape(length, -1, size).repeat(group, 1)
        scores = np.einsum("thd,shd->hts", q, k) / np.sqrt(size)
        scores[:, np.triu_indices(length, 1)[0], np.triu_indices(length, 1)[1]] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        mixed = np.einsum("hts,shd->thd", weights, v).reshape(length, -1)
        x = x + project(mixed, "blocks.attention.out", layer)
        h = norm(x, params["blocks.mlp_norm.weight"][layer])
        gate = project(h, "blocks.mlp.gate", layer)
        x = x + project(gate / (1 + np.exp(-gate)) * project(h, "blocks.mlp.up", layer), "blocks.mlp.down", layer)
    return norm(x, params["final_norm.weight"]) @ params.get("unembed.weight", params["embed.weight"]).T


@pytest.mark.parametrize("config", VARIANTS, ids=["untied", "tied with biases"])
def test_logits_are_those_of_a_plain_llama_in_float64(config):
    params = noisy_params(config)
    lengths = [9, 1, 6]
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (1, 19))
    with jax.enable_x64(True):
        model = functional(config, dtype=jnp.float64)
        wide = {name: jnp.asarray(value, jnp.float64) for name, value in params.items()}
        hidden, *_ = model.hidden(wide, jnp.asarray(tokens), packed(lengths, 19))
        logits = np.asarray(model.unembed(wide, hidden))[0]
    assert logits.dtype == np.float64
    start = 0
    for length in lengths:  # each packed document is as if it were alone
        expected = plain_llama(config, params, tokens[0, start : start + length])
        np.testing.assert_allclose(logits[start : start + length], expected, rtol=1e-9, atol=1e-9)
        start += length


def test_module_and_function_are_one_model():
    model = Decoder(TINY, rngs=nnx.Rngs(0))
    tokens = jnp.arange(8)[None]
    context = packed([8], 8)
    hidden, *_ = model(tokens, context)
    again, *_ = functional(TINY).hidden(model.params(), tokens, context)
    np.testing.assert_array_equal(hidden, again)
    other = Decoder(TINY, rngs=nnx.Rngs(1))
    other.load_params(model.params())
    np.testing.assert_array_equal(other(tokens, context)[0], hidden)


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_remat_changes_memory_and_no_gradient(remat):
    params = init_params(TINY, 0)
    tokens = jnp.arange(12)[None]

    def loss(params, remat):
        hidden, *_ = functional(TINY, remat=remat).hidden(params, tokens, packed([7, 5], 12))
        return jnp.sum(hidden**2)

    plain = jax.grad(loss)(params, "none")
    again = jax.grad(loss)(params, remat)
    for name in plain:
        np.testing.assert_allclose(again[name], plain[name], rtol=2e-5, atol=2e-5, err_msg=name)


MIXTURE = dataclasses.replace(TINY, num_layers=5, moe=MoEConfig(4, 2, 56, router="sigmoid"))


@pytest.mark.parametrize("remat", thorough(["full", "none", "dots"]))
@pytest.mark.parametrize("config", [dataclasses.replace(TINY, num_layers=5), MIXTURE], ids=["dense", "mixture"])
def test_no_gathered_weight_is_kept_for_the_backward_pass(config, remat):
    """The compiled loops over the layers carry weights [L, ...] only as they rest, each device's part."""
    mesh = Plan(fsdp=4).mesh()
    model, places = functional(config, remat=remat), param_shardings(config, mesh)
    shapes = param_shapes(config)
    params = {n: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=places[n]) for n, a in shapes.items()}
    tokens = jax.ShapeDtypeStruct((4, 24), jnp.int32, sharding=Plan(fsdp=4).batch_sharding(mesh))

    def loss(params, tokens):
        context = PackedContext(jnp.ones_like(tokens), jnp.broadcast_to(jnp.arange(24), tokens.shape))
        with use(mesh):
            return jnp.sum(model.hidden(params, tokens, context)[0] ** 2)

    text = jax.jit(jax.grad(loss)).lower(params, tokens).compile().as_text()
    carried = " ".join(re.findall(r"= \((.*)\) while\(", text))
    resting = {name: places[name].shard_shape(a.shape) for name, a in params.items() if name.startswith("blocks.")}
    stacks = {name: params[name].shape for name in resting if resting[name] != params[name].shape}
    assert any(f"f32[{','.join(map(str, resting[name]))}]" in carried for name in stacks)
    kept = [name for name, shape in stacks.items() if f"f32[{','.join(map(str, shape))}]" in carried]
    assert not kept


def test_remat_dots_computes_no_product_of_a_weight_again():
    params, tokens = init_params(TINY, 0), jnp.zeros((1, 8), jnp.int32)

    def products(remat):
        def loss(params):
            return jnp.sum(functional(TINY, remat=remat).hidden(params, tokens, packed([8], 8))[0])

        return str(jax.make_jaxpr(jax.grad(loss))(params)).count("dot_general[")

    # Attention's two are computed again either way; seven more are those of the block's weights, less the last, which
    # the backward pass does not need.
    assert products("none") < products("dots") == products("full") - 6


def test_layers_one_by_one_are_the_scan():
    params = init_params(TINY, 0)
    model = functional(TINY)
    outside, layers = split_layers(TINY, params)
    context = packed([6], 6)
    x, rope = model.bind(outside).begin(jnp.arange(6)[None], context)
    for index, layer in enumerate(layers):
        x, *_ = model.block(layer, LayerKind())(x, rope, context, None, index)
    x = model.bind(outside).final_norm(x)
    expected, *_ = model.hidden(params, jnp.arange(6)[None], context)
    np.testing.assert_allclose(x, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "plan", thorough([Plan(fsdp=2, tensor=2), Plan(fsdp=4), Plan(data=4), Plan(data=2, fsdp=2)]), ids=str
)
def test_a_mesh_gives_the_numbers_of_one_device(plan):
    config = dataclasses.replace(TINY, attention_bias=True, vocab_size=64)
    mesh = plan.mesh()
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (4, 10)).astype(np.int32)
    segments = np.ones((4, 10), np.int32)
    positions = np.tile(np.arange(10, dtype=np.int32), (4, 1))

    def loss(params, tokens, context, mesh):
        model = functional(config, dtype=jnp.float64)
        with use(mesh):
            hidden, *_ = model.hidden(params, tokens, context)
            return jnp.mean(jax.nn.logsumexp(model.unembed(params, hidden), axis=-1) ** 2)

    with jax.enable_x64(True):
        gradient = jax.jit(jax.value_and_grad(loss), static_argnums=3)
        alone = init_params(config, 5, dtype=jnp.float64)
        spread = init_params(config, 5, dtype=jnp.float64, mesh=mesh)
        for name in alone:  # the values depend on the seed, not on the mesh
            np.testing.assert_array_equal(np.asarray(alone[name]), np.asarray(spread[name]), err_msg=name)
        if plan.fsdp > 1:
            weight = spread["blocks.mlp.up.weight"]
            assert weight.addressable_shards[0].data.size == weight.size // (plan.fsdp * plan.tensor)
        one, gradients = gradient(alone, tokens, PackedContext(segments, positions), None)
        rows = [jax.device_put(a, plan.batch_sharding(mesh)) for a in (tokens, segments, positions)]
        many, spread_gradients = gradient(spread, rows[0], PackedContext(rows[1], rows[2]), mesh)
    np.testing.assert_allclose(many, one, rtol=1e-12)
    for name in gradients:
        np.testing.assert_allclose(spread_gradients[name], gradients[name], rtol=1e-9, atol=1e-12, err_msg=name)


@pytest.mark.parametrize(
    "moe", [None, MoEConfig(4, 2, 8, shared_experts=1, router="sigmoid")], ids=["dense", "mixture"]
)
def test_every_parameter_has_a_logical_name_for_each_axis(moe):
    config = dataclasses.replace(TINY, moe=moe)
    axes = param_axes(config)
    shapes = param_shapes(config)
    assert set(axes) == set(shapes)
    for name, names in axes.items():
        assert len(names) == len(shapes[name].shape), name
        assert all(names), name
        assert (names[0] == "layers") == name.startswith("blocks."), name


def test_parameters_that_do_not_fit_are_all_listed():
    shapes = param_shapes(TINY)
    wrong = dict(shapes)
    del wrong["final_norm.weight"]
    wrong["extra"] = shapes["embed.weight"]
    wrong["embed.weight"] = jax.ShapeDtypeStruct((2, 2), jnp.float32)
    listed = r"missing final_norm\.weight; unknown extra; embed\.weight has shape \(2, 2\)"
    with pytest.raises(ValueError, match=listed):
        check_params(wrong, shapes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_kv_heads": 3}, "must divide num_heads"),
        ({"head_dim": 7}, "must be even"),
        ({"num_layers": 0}, "num_layers is a whole number from 1 up"),
        ({"hidden_size": 3.5}, "hidden_size is a whole number"),
        ({"norm_eps": 0.0}, "norm_eps lies between"),
        ({"moe": MoEConfig(4, 2, 8), "mlp_bias": True}, "experts have no biases"),
    ],
)
def test_a_config_that_makes_no_model_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)


def test_config_survives_json():
    mixture = dataclasses.replace(TINY, moe=MoEConfig(4, 2, 8, router="sigmoid"))
    for config in (*VARIANTS, mixture):
        assert DecoderConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    before_mixtures = {key: value for key, value in TINY.to_dict().items() if key != "moe"}
    assert DecoderConfig.from_dict(before_mixtures) == TINY
    with pytest.raises(ValueError, match=r"unknown here: \['colour'\]"):
        DecoderConfig.from_dict({**TINY.to_dict(), "colour": 1})


def test_an_unknown_remat_lists_the_choices():
    with pytest.raises(ValueError, match="none, full, dots"):
        functional(TINY, remat="half")

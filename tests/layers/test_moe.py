"""The mixture of experts against a loop over tokens and experts, in float64; on meshes; and its bits when served."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from tests.thorough import thorough
from twinax.layers.moe import MoE
from twinax.layers.moe_config import MoEConfig
from twinax.layers.router import RouterWeights, route
from twinax.sharding.plan import Plan
from twinax.sharding.rules import activation_sharding, parameter_sharding, use

D = 16
SOFTMAX = MoEConfig(num_experts=8, experts_per_token=2, expert_size=12)
SIGMOID = dataclasses.replace(SOFTMAX, router="sigmoid", shared_experts=2, route_scale=2.5, bias_update=0.01)
CONFIGS = {
    "softmax": SOFTMAX,
    "not normalised": dataclasses.replace(SOFTMAX, normalize=False, experts_per_token=3),
    "sigmoid": SIGMOID,
    "one expert a token": dataclasses.replace(SOFTMAX, experts_per_token=1, normalize=False, shared_experts=1),
    "every expert": dataclasses.replace(SOFTMAX, experts_per_token=8),
}


def make(config: MoEConfig, seed: int = 0):
    """The layer as graph and parameters, by name, all of them different from 0 and 1, in float64."""
    graph, state = nnx.split(MoE(D, config, rngs=nnx.Rngs(seed), param_dtype=jnp.float64))
    rng = np.random.default_rng(seed)
    state = jax.tree.map(lambda p: jnp.asarray(0.4 * rng.standard_normal(p.shape)), state)
    return graph, state


def inputs(rows: int = 8, tokens: int = 8, seed: int = 1):
    """x [B, T, D], which of them are tokens, and a cotangent."""
    rng = np.random.default_rng(seed)
    x, dy = rng.standard_normal((2, rows, tokens, D))
    return x, rng.random((rows, tokens)) < 0.8, dy


def by_loops(config: MoEConfig, params: dict, x, is_token):
    """y [..., D] and the statistics, one token and one expert at a time."""

    def ffn(x_D, gate, up, down):
        return down @ (jax.nn.silu(gate @ x_D) * (up @ x_D))

    router, experts = params["router"], [params[name]["weight"] for name in ("gate", "up", "down")]
    E = config.num_experts
    tokens, probability, z, out = np.zeros(E, int), jnp.zeros(E), 0.0, []
    for x_D, real in zip(x.reshape(-1, D), is_token.reshape(-1), strict=True):
        logits = router["weight"] @ x_D
        scores = jax.nn.softmax(logits) if config.router == "softmax" else 1 / (1 + jnp.exp(-logits))
        chosen = np.argsort(-np.asarray(jax.lax.stop_gradient(scores + router.get("bias", 0))), kind="stable")
        chosen = chosen[: config.experts_per_token]
        total = sum(scores[e] for e in chosen) if config.normalize else 1
        y = jnp.zeros(D)
        if real:
            for e in chosen:
                y += config.route_scale * scores[e] / total * ffn(x_D, *(weight[e] for weight in experts))
                tokens[e] += 1
            probability += scores / jnp.sum(scores)
            z += jnp.log(jnp.sum(jnp.exp(logits))) ** 2
        if config.shared_experts:
            y += ffn(x_D, *(params["shared"][name]["weight"] for name in ("gate", "up", "down")))
        out.append(y)
    return jnp.stack(out).reshape(x.shape), (tokens, probability, z)


def loss(apply, dy, state, x):
    """A scalar through which every output passes a gradient, and what it is made of."""
    y, (tokens, probability, z) = apply(state, x)
    push = jnp.arange(1.0, len(probability) + 1)
    return jnp.sum(y * dy) + jnp.sum(push * probability) + 0.3 * z, (y, tokens, probability, z)


def layer(graph, is_token, state, x):
    y, statistics = nnx.merge(graph, state)(x, is_token)
    return y, (statistics.tokens_E, statistics.probability_E, statistics.z)


def value_and_gradients(apply, state, x, dy):
    return jax.value_and_grad(partial(loss, apply, dy), argnums=(0, 1), has_aux=True)(state, x)


def assert_same(got, want, tolerance=1e-10):
    for (path, a), (_, b) in zip(*(jax.tree_util.tree_leaves_with_path(tree) for tree in (got, want)), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b), (jax.tree_util.keystr(path), a, b)


@pytest.mark.parametrize("name", thorough(CONFIGS, range(0, len(CONFIGS), 2)))
def test_values_statistics_and_gradients_are_those_of_a_loop_over_tokens_and_experts(name):
    config = CONFIGS[name]
    with jax.enable_x64(True):
        graph, state = make(config)
        x, is_token, dy = inputs(2, 3)
        own = jax.jit(partial(value_and_gradients, partial(layer, graph, is_token)))
        got = own(state, x, dy)

        def loops(state, x):
            return by_loops(config, nnx.to_pure_dict(state), x, is_token)

        want = value_and_gradients(loops, state, x, dy)
        assert_same(got, want)
        if config.router == "sigmoid":
            assert not np.any(got[1][0]["router"]["bias"].get_value())  # balanced from outside, never learnt


PLANS = [
    ("expert=4", "sigmoid"),
    ("expert=2,fsdp=2", "not normalised"),
    ("expert=2,tensor=2", "sigmoid"),
    ("expert=2,sequence=2", "softmax"),
    ("expert=8", "every expert"),
    ("expert=2,data=2,tensor=2", "one expert a token"),
    ("data=2,tensor=2,sequence=2", "sigmoid"),
]


@pytest.mark.parametrize(("plan", "name"), thorough(PLANS, 2))
def test_a_plan_gives_the_values_statistics_and_gradients_of_one_device(plan, name):
    check_plan(Plan.parse(plan), CONFIGS[name])


@pytest.mark.parametrize("plan", thorough(["stage=2,expert=2,tensor=2", "stage=2,fsdp=2,sequence=2"]))
def test_it_can_be_mapped_over_the_stages_of_a_pipeline(plan):
    """Two layers with their own inputs, each on its stage."""
    mesh = Plan.parse(plan).mesh()
    with jax.enable_x64(True):
        (graph, first), (_, second) = make(SIGMOID, 0), make(SIGMOID, 1)
        x, is_token, dy = inputs()
        alone = jax.jit(partial(layer, graph, is_token))
        want = [alone(state, x) for state, x in ((first, x), (second, dy))]
        axes = ("stage",), ("stage", "expert"), ("expert",)
        place = tuple(NamedSharding(mesh, PartitionSpec(*names)) for names in axes)
        states = jax.tree.map(lambda *a: jnp.stack(a), first, second)
        placed = jax.device_put((states, np.stack([x, dy]), is_token), place)

        @jax.jit
        def run(states, x, is_token):
            with use(mesh):
                return jax.vmap(partial(layer, graph, is_token), spmd_axis_name="stage")(states, x)

        got = run(*placed)
    for stage in range(2):
        assert_same(jax.tree.map(lambda a, stage=stage: a[stage], got), want[stage])


def check_plan(plan: Plan, config: MoEConfig, change=lambda state: state, constant: bool = False):
    mesh = plan.mesh()
    with jax.enable_x64(True):
        graph, state = make(config)
        state = change(state)
        x, is_token, dy = inputs()
        if constant:
            x[..., 0] = 1

        def run(mesh, state, x, is_token, dy):
            with use(mesh):
                return value_and_gradients(partial(layer, graph, is_token), state, x, dy)

        want = jax.jit(partial(run, None))(state, x, is_token, dy)
        places = [
            (path, leaf.replace(parameter_sharding(leaf.get_metadata()["axes"], mesh, leaf.get_value().shape)))
            for path, leaf in nnx.to_flat_state(state)
        ]
        place = nnx.from_flat_state(places), *[activation_sharding(("batch", "tokens"), mesh)] * 3
        placed = jax.device_put((state, x, is_token, dy), place)
        got = jax.jit(partial(run, mesh)).lower(*placed).compile()(*placed)
    assert_same(got, want)
    return got


def to_one_expert(state):
    """A router that sends every token to experts 3 and 5, whatever it is: only the constant column 0 counts."""
    weight = np.zeros((8, D))
    weight[[3, 5], 0] = 50, 40
    state["router"]["weight"].set_value(jnp.asarray(weight))
    return state


@pytest.mark.parametrize("plan", thorough(["expert=2,fsdp=2,tensor=2", "expert=4", "expert=8"]))
def test_no_token_is_dropped_when_all_go_to_the_same_experts(plan):
    got = check_plan(Plan.parse(plan), SOFTMAX, to_one_expert, constant=True)
    (_, (y, tokens, _, _)), _ = got
    _, is_token, _ = inputs()
    np.testing.assert_array_equal(tokens, np.where(np.isin(np.arange(8), (3, 5)), is_token.sum(), 0))
    assert np.all(np.any(np.asarray(y) != 0, axis=-1) == is_token)


def test_padding_reaches_no_expert():
    with jax.enable_x64(True):
        graph, state = make(SOFTMAX)
        x, is_token, _ = inputs(2, 6)
        function = jax.jit(lambda x, is_token: nnx.merge(graph, state)(x, is_token))
        y, statistics = function(x, is_token)
        other, again = function(np.where(is_token[..., None], x, np.nan), is_token)
        np.testing.assert_array_equal(np.asarray(y)[~is_token], 0)
        np.testing.assert_array_equal(np.asarray(other)[is_token], np.asarray(y)[is_token])
        assert_same(again, statistics, 0)
        assert int(jnp.sum(statistics.tokens_E)) == 2 * is_token.sum()


@pytest.mark.usefixtures("full_compile")
@pytest.mark.parametrize("width", thorough([64, 512]))
def test_a_served_token_has_the_same_bits_in_any_company(width):
    """The engine runs 8 rows and more; which of them are a request's, and what the others hold, must not matter."""
    config = dataclasses.replace(SIGMOID, expert_size=width // 2 + 8)
    graph, state = nnx.split(MoE(width, config, rngs=nnx.Rngs(0)))
    function = jax.jit(lambda x, is_token: nnx.merge(graph, state)(x, is_token)[0])
    rng = np.random.default_rng(0)
    mine = rng.standard_normal((5, width)).astype(np.float32)
    want = None
    for rows, others in ((8, 0), (8, 3), (32, 27), (32, 4), (264, 250)):
        x = np.full((rows, width), np.nan, np.float32)
        place = rng.permutation(rows)
        x[place[:5]], x[place[5 : 5 + others]] = mine, 10 * rng.standard_normal((others, width))
        got = np.asarray(function(x, np.isin(np.arange(rows), place[: 5 + others])))[place[:5]]
        want = got if want is None else want
        np.testing.assert_array_equal(got, want, err_msg=f"{rows} rows, {others} others")


def test_router_and_statistics_are_float32_in_a_bfloat16_model():
    graph, state = nnx.split(MoE(D, SIGMOID, rngs=nnx.Rngs(0)))
    x = jnp.asarray(inputs()[0], jnp.bfloat16)
    function = jax.jit(lambda x, is_token: nnx.merge(graph, state)(x, is_token))
    y, statistics = function(x, np.ones(x.shape[:2], bool))
    assert y.dtype == jnp.bfloat16
    assert statistics.probability_E.dtype == statistics.z.dtype == jnp.float32
    x_ND, weight_ED = x.reshape(-1, D), state["router"]["weight"].get_value()
    got = route(SIGMOID, x_ND, RouterWeights(weight_ED, jnp.zeros(8), None))
    with jax.enable_x64(True):
        weights = RouterWeights(weight_ED.astype(jnp.float64), jnp.zeros(8), None)
        want = route(SIGMOID, x_ND.astype(jnp.float64), weights)
    np.testing.assert_array_equal(got.expert_NK, want.expert_NK)
    np.testing.assert_allclose(got.weight_NK, want.weight_NK, rtol=1e-5)


def test_the_bias_chooses_and_does_not_weigh():
    x_ND = jnp.asarray(inputs()[0].reshape(-1, D), jnp.float32)
    weight_ED = jnp.asarray(np.random.default_rng(3).standard_normal((8, D)), jnp.float32)
    config = dataclasses.replace(SIGMOID, normalize=False, route_scale=1.0)
    routes = route(config, x_ND, RouterWeights(weight_ED, jnp.zeros(8).at[6].set(2.0), None))
    assert np.all(routes.expert_NK[:, 0] == 6)
    np.testing.assert_allclose(routes.weight_NK[:, 0], jax.nn.sigmoid(x_ND @ weight_ED[6]), rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_experts": 0}, "num_experts is a whole number from 1 up; got 0"),
        ({"experts_per_token": 9}, "experts_per_token=9 is more than num_experts=8"),
        ({"shared_experts": -1}, "shared_experts is a whole number from 0 up"),
        ({"router": "hash"}, "router is one of softmax, sigmoid; got 'hash'"),
        ({"z_loss": -0.1}, "z_loss is a number from 0 up"),
        ({"bias_update": 0.1}, "moves the bias of a sigmoid router; this router is 'softmax'"),
    ],
)
def test_settings_that_make_no_mixture_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SOFTMAX, **change)


def test_settings_survive_a_dict():
    assert MoEConfig.from_dict(dataclasses.asdict(SIGMOID)) == SIGMOID
    with pytest.raises(ValueError, match=r"unknown here: \['colour'\], missing: \['expert_size'\]"):
        MoEConfig.from_dict({"num_experts": 4, "experts_per_token": 1, "colour": 1})

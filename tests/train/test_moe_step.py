"""The step of a mixture of experts: equal on every layout, balanced by its losses or its bias, resumed bit for bit."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.thorough import thorough
from tests.train.helpers import MODEL, difference, mean_gradients, random_batch, small_recipe
from twinax.layers.contexts import PackedContext
from twinax.layers.moe_config import MoEConfig
from twinax.models.config import LayerKind
from twinax.models.decoder import functional, init_params, split_layers
from twinax.sharding.plan import Plan
from twinax.train import balance
from twinax.train.gradients import gradients
from twinax.train.loop import train
from twinax.train.metrics import read_metrics
from twinax.train.recipe import OptimizerConfig
from twinax.train.step import init_state, make_step, put_batch, state_shardings

SOFTMAX = MoEConfig(4, 2, 16, balance_loss=0.3, z_loss=0.1)
SIGMOID = MoEConfig(4, 2, 16, shared_experts=1, router="sigmoid", route_scale=1.5, balance_loss=0.2, bias_update=0.02)
MOES = {"softmax": SOFTMAX, "sigmoid": SIGMOID}
ONE = Plan()


def config(moe: MoEConfig):
    return dataclasses.replace(MODEL.decoder(64, 16), moe=moe)


LAYOUTS = [
    ("softmax", "", 4, "none"),
    ("sigmoid", "expert=2,data=2,tensor=2", 2, "none"),
    ("softmax", "expert=2,fsdp=2", 2, "none"),
    ("sigmoid", "expert=4", 2, "none"),
    ("sigmoid", "", 2, "full"),
    ("softmax", "expert=4", 1, "full"),
    ("sigmoid", "expert=2,tensor=2", 1, "dots"),
    ("softmax", "expert=2,sequence=2", 1, "none"),
    ("softmax", "fsdp=2,tensor=2,sequence=2", 2, "none"),
]


@pytest.mark.parametrize(("name", "plan", "accumulation", "remat"), thorough(LAYOUTS))
def test_any_layout_gives_the_gradients_and_statistics_of_one_device_in_float64(name, plan, accumulation, remat):
    with jax.enable_x64(True):
        want = mean_gradients(config(MOES[name]))
        got = mean_gradients(config(MOES[name]), Plan.parse(plan), accumulation, remat=remat)
    assert difference(got, want) < 1e-9
    np.testing.assert_array_equal(got[3].tokens_E, want[3].tokens_E)


@pytest.mark.parametrize("name", thorough(MOES))
def test_the_gradient_is_that_of_the_loss_and_the_penalties_written_out(name):
    """Load-balancing loss and z-loss from each token's logits, as the papers write them."""
    moe, batch = MOES[name], random_batch(0)
    with jax.enable_x64(True):
        model = functional(config(moe), dtype=jnp.float64)
        params = init_params(model.config, 0, dtype=jnp.float64)
        outside, layers = split_layers(model.config, params)
        real = (batch.segment_ids_BT != 0).reshape(-1)

        def objective(params):
            context = PackedContext(jnp.asarray(batch.segment_ids_BT), jnp.asarray(batch.positions_BT))
            x, ropes = model.bind(params).begin(batch.tokens_BT, context)
            total = 0.0
            for index in range(model.config.num_layers):
                own = {n.removeprefix("blocks."): a[index] for n, a in params.items() if "blocks." in n}
                block = model.block(own, LayerKind())
                mixed, _ = block.attention(block.attention_norm(x), ropes["rope"], context, None, index)
                router = block.moe.router
                logits = (block.mlp_norm(x + mixed).reshape(-1, 32) @ router.weight[...].T)[real]
                scores = jax.nn.softmax(logits) if name == "softmax" else jax.nn.sigmoid(logits)
                chosen = jnp.argsort(-scores, axis=-1)[:, :2]
                share = jnp.mean(jnp.sum(jax.nn.one_hot(chosen, 4), axis=1), axis=0) / 2
                mean = jnp.mean(scores / jnp.sum(scores, axis=-1, keepdims=True), axis=0)
                total += moe.balance_loss * 4 * jnp.sum(jax.lax.stop_gradient(share) * mean)
                total += moe.z_loss * jnp.mean(jnp.log(jnp.sum(jnp.exp(logits), axis=-1)) ** 2)
                x = block(x, ropes, context, None, index)[0]
            logits = model.bind(params).unembed(model.bind(params).final_norm(x))
            nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), batch.targets_BT[..., None], axis=-1)[..., 0]
            return total + jnp.sum(nll * batch.weights_BT) / np.sum(batch.weights_BT)

        want = jax.jit(jax.grad(objective))(params)
        got = mean_gradients(config(MOES[name]))
    assert difference(got[0], jax.device_get(want)) < 1e-9
    assert outside.keys() <= got[0].keys() and len(layers) == 2


def run(moe: MoEConfig, steps: int, state=None, start: int = 0, rows=random_batch, lr: float = 3e-3):
    """Metrics of each step, and the state after them."""
    mesh, settings = ONE.mesh(), OptimizerConfig(lr=lr)
    state = (
        init_state(config(moe), 0, mesh) if state is None else jax.device_put(state, state_shardings(config(moe), mesh))
    )
    step = compiled(moe, settings)
    found = []
    for number in range(start, start + steps):
        state, metrics = step(state, put_batch(rows(number), number, 1, mesh))
        found.append({name: value.item() for name, value in metrics.items()})
    return found, jax.device_get(state)


@functools.cache
def compiled(moe: MoEConfig, settings: OptimizerConfig):
    mesh = ONE.mesh()
    step = make_step(config(moe), settings, lambda step: jnp.float32(settings.lr), mesh)
    state = init_state(config(moe), 0, mesh)
    return step.lower(state, put_batch(random_batch(0), 0, 1, mesh)).compile()


def crooked(moe: MoEConfig):
    """A state whose routers like expert 0 best and expert 3 least: all tokens have something in common."""
    state = jax.device_get(init_state(config(moe), 0, ONE.mesh()))
    weight_LED = np.array(state["params"]["blocks.moe.router.weight"])
    weight_LED[:, 0] += 0.08
    weight_LED[:, 3] -= 0.08
    changed = {"embed.weight": state["params"]["embed.weight"] + 0.02, "blocks.moe.router.weight": weight_LED}
    return {**state, "params": {**state["params"], **changed}}


def loads(moe: MoEConfig, **options):
    """How uneven the load is at each of 48 steps over one batch, and the state after them."""
    found, state = run(moe, 48, crooked(moe), rows=lambda number: random_batch(0), **options)
    return [metrics["load_imbalance"] for metrics in found], state


@pytest.mark.slow
def test_the_load_balancing_loss_evens_the_load():
    none = dataclasses.replace(SOFTMAX, balance_loss=0.0, z_loss=0.0)
    without, _ = loads(none, lr=1e-3)
    balanced, _ = loads(dataclasses.replace(none, balance_loss=1.0), lr=1e-3)
    assert without[0] == balanced[0] > 1.9
    assert min(without[-8:]) > 1.6
    assert max(balanced[-8:]) < 1.3


@pytest.mark.slow
def test_the_bias_alone_evens_the_load_and_the_optimizer_leaves_it():
    moe = dataclasses.replace(SIGMOID, balance_loss=0.0, z_loss=0.0)
    found, state = loads(moe, lr=1e-12)  # all else stands still
    assert min(found[:8]) > 1.9
    assert max(found[-8:]) < 1.3
    bias_LE = state["params"][balance.BIAS]
    np.testing.assert_allclose(bias_LE / moe.bias_update, np.round(bias_LE / moe.bias_update), atol=1e-4)
    assert np.all(np.abs(bias_LE) <= 48 * moe.bias_update * (1 + 1e-6)) and np.any(bias_LE)
    for moment in ("mu", "nu"):
        assert not np.any(state["optimizer"][moment][balance.BIAS])


def test_one_step_moves_each_bias_towards_the_mean_load():
    load_LE = np.array([[10, 2, 4, 4], [5, 5, 5, 5]], np.int32)
    bias_LE = np.full((2, 4), 0.5, np.float32)
    moved = balance.moved_bias(SIGMOID, jnp.asarray(bias_LE), jnp.asarray(load_LE))
    np.testing.assert_allclose(moved, bias_LE + SIGMOID.bias_update * np.array([[-1, 1, 1, 1], [0, 0, 0, 0]]))


def test_a_run_in_two_pieces_has_the_bits_of_one():
    _, whole = run(SIGMOID, 4)
    _, half = run(SIGMOID, 2)
    _, joined = run(SIGMOID, 2, half, start=2)
    assert jax.tree.all(jax.tree.map(np.array_equal, joined, whole))
    assert np.any(whole["params"][balance.BIAS])


def test_a_bad_step_leaves_the_bias_too():
    _, before = run(SIGMOID, 1)

    def poisoned(number):
        batch = random_batch(number)
        batch.weights_BT[3, 2] = np.nan
        return batch

    (metrics,), after = run(SIGMOID, 1, before, start=1, rows=poisoned)
    assert not metrics["ok"]
    assert jax.tree.all(jax.tree.map(np.array_equal, after, before))


@pytest.mark.slow
def test_metrics_are_those_of_the_tokens():
    (metrics,), _ = run(SOFTMAX, 1)
    mesh, model = ONE.mesh(), functional(config(SOFTMAX))
    params, batch = init_params(model.config, 0), put_batch(random_batch(0), 0, 1, mesh)
    _, loss, _, statistics = jax.jit(functools.partial(gradients, model))(params, batch)
    tokens = np.count_nonzero(random_batch(0).segment_ids_BT)
    assert metrics["loss"] == pytest.approx(float(loss), rel=1e-5)  # without the penalties
    load_LE = np.asarray(statistics.tokens_E) / (2 * tokens)
    assert np.all(np.abs(load_LE.sum(-1) - 1) < 1e-12)
    balance_L = 4 * np.sum(load_LE * np.asarray(statistics.probability_E), -1) / tokens
    assert metrics["load_imbalance"] == pytest.approx(4 * load_LE.max(), rel=1e-6)
    assert metrics["balance_loss"] == pytest.approx(np.mean(balance_L), rel=1e-5)
    assert metrics["z_loss"] == pytest.approx(float(np.mean(statistics.z)) / tokens, rel=1e-5)


@pytest.mark.slow
def test_a_run_on_a_mesh_resumes_on_one_device(tmp_path):
    """Through the loop: text, evaluation, checkpoints, metrics."""
    model = dataclasses.replace(MODEL, experts=4, expert_size=16, router="sigmoid", bias_update=0.01)
    recipe = small_recipe(tmp_path, model=model, steps=2, plan="expert=2,data=2")
    train(recipe, display=False)
    longer = dataclasses.replace(recipe, steps=3, plan="")
    result = train(longer, display=False, resume="must")
    lines = [line for line in read_metrics(result.metrics) if line["kind"] == "train"]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(line["balance_loss"] > 0.5 and line["load_imbalance"] >= 1 and line["z_loss"] > 0 for line in lines)
    # One device from the start goes the same way, but for rounding.
    again = train(dataclasses.replace(longer, output=str(tmp_path / "other")), display=False)
    assert result.loss == pytest.approx(again.loss, rel=1e-5)

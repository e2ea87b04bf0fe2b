"""The step: equal on any number of micro-batches and devices, safe from NaN, able to learn."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.thorough import thorough
from tests.train.helpers import MODEL, difference, mean_gradients, random_batch
from twinax.models.decoder import functional, init_params
from twinax.sharding.plan import Plan
from twinax.train import optimizer, schedules
from twinax.train.gradients import gradients
from twinax.train.recipe import OptimizerConfig, ScheduleConfig
from twinax.train.step import init_state, make_step, put_batch, state_like, state_shardings

CONFIG = MODEL.decoder(64, 16)
ONE = Plan()


def constant(step):
    return jnp.float32(1e-2)


def put(seed: int, step: int, plan: Plan = ONE):
    return put_batch(random_batch(seed), step, 1, plan.mesh())


@functools.cache
def fresh(plan: Plan = ONE):
    return jax.device_get(init_state(CONFIG, 0, plan.mesh()))


def start(plan: Plan = ONE):
    """The state before step 0; a copy, as a step consumes it."""
    return jax.device_put(fresh(), state_shardings(CONFIG, plan.mesh()))


@functools.cache
def stepper(plan: Plan = ONE, schedule=constant, dtype=jnp.float32):
    step = make_step(CONFIG, OptimizerConfig(), schedule, plan.mesh(), dtype=dtype)
    return step.lower(start(plan), put(0, 0, plan)).compile()


def run(steps: int, plan: Plan = ONE, **options):
    state, found = start(plan), []
    for step in range(steps):
        state, metrics = stepper(plan, **options)(state, put(step, step, plan))
        found.append({name: value.item() for name, value in metrics.items()})
    return jax.device_get(state), found


LAYOUTS = [("", 4), ("fsdp=4", 1), ("fsdp=2", 2), ("data=4", 2), ("data=2,fsdp=2", 1)]
LAYOUTS += [("tensor=2", 1), ("fsdp=2,tensor=2", 2), ("data=2,fsdp=2,tensor=2", 1)]


@pytest.mark.parametrize(("plan", "accumulation"), thorough(LAYOUTS, [2, 7]))
def test_any_layout_gives_the_loss_and_gradients_of_one_device_in_float64(plan, accumulation):
    with jax.enable_x64(True):
        want = mean_gradients(CONFIG)
        got = mean_gradients(CONFIG, Plan.parse(plan), accumulation)
    assert got[2] == want[2] == random_batch(0).weights_BT.sum()
    assert got[1] == pytest.approx(want[1], rel=1e-12)
    assert difference(got[0], want[0]) < 1e-9


@pytest.mark.parametrize(("plan", "accumulation"), thorough([("fsdp=2,tensor=2", 1), ("", 4), ("fsdp=4", 1)]))
def test_and_in_float32_to_rounding(plan, accumulation):
    want = mean_gradients(CONFIG, dtype=jnp.float32)
    got = mean_gradients(CONFIG, Plan.parse(plan), accumulation, jnp.float32)
    assert got[1] == pytest.approx(want[1], rel=1e-6)
    assert difference(got[0], want[0]) < 1e-6


def test_a_sharded_run_keeps_its_losses():
    _, want = run(4)
    _, got = run(4, Plan.parse("fsdp=4"))
    assert [m["loss"] for m in got] == pytest.approx([m["loss"] for m in want], rel=1e-5)


def test_the_loss_in_chunks_under_a_mesh_sums_the_gradient_once(monkeypatch):
    """Several chunks, so that the loop over them runs on every device, and one sum over devices after it."""
    from twinax.train import loss

    monkeypatch.setattr(loss, "LEAST_TOKENS", 0)
    monkeypatch.setattr(loss, "CPU_CHUNK_BYTES", 8 * 5 * 64 * 4)
    want = mean_gradients(CONFIG, dtype=jnp.float32)
    got = mean_gradients.__wrapped__(CONFIG, Plan.parse("fsdp=4"), dtype=jnp.float32)
    assert difference(got[0], want[0]) < 1e-6


@pytest.mark.parametrize("remat", ["dots", "full", "offload"])
def test_remat_changes_no_gradient(remat):
    want = mean_gradients(CONFIG, dtype=jnp.float32)
    got = mean_gradients(CONFIG, dtype=jnp.float32, remat=remat)
    assert difference(got[0], want[0]) < 1e-6


def test_bfloat16_products_keep_float32_parameters_and_nearly_the_loss():
    state, got = run(3, dtype=jnp.bfloat16)
    _, want = run(3)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state["params"])} == {"float32"}
    assert [m["loss"] for m in got] == pytest.approx([m["loss"] for m in want], rel=2e-2)


def test_it_overfits_a_small_batch():
    state = start()
    for step in range(120):
        state, metrics = stepper()(state, put(0, step))
    assert float(metrics["loss"]) < 0.1 < np.log(64)


def test_metrics_are_those_of_the_step():
    schedule = schedules.make(ScheduleConfig(warmup_steps=4), 1e-3, 10)
    grads, loss, weight, _ = mean_gradients(CONFIG, dtype=jnp.float32)
    _, (metrics,) = run(1, schedule=schedule)
    norm = np.sqrt(sum(float(np.sum(np.square(g, dtype=np.float64))) for g in grads.values()))
    assert metrics == {
        "loss": pytest.approx(loss, rel=1e-6),
        "grad_norm": pytest.approx(norm, rel=1e-5),
        "lr": pytest.approx(1e-3 / 4),
        "tokens": weight,
        "ok": True,
    }


@pytest.mark.parametrize("wrong", ["nan", "another step"])
def test_a_bad_step_leaves_the_state_and_so_do_all_after_it(wrong):
    state, _ = stepper()(start(), put(0, 0))
    before = jax.device_get(state)
    batch = random_batch(1)
    if wrong == "nan":
        batch.weights_BT[3, 2] = np.nan
    number = 1 if wrong == "nan" else 2
    state, metrics = stepper()(state, put_batch(batch, number, 1, ONE.mesh()))
    assert not metrics["ok"]
    state, metrics = stepper()(state, put(2, 2))  # was on its way already
    assert not metrics["ok"]
    assert jax.tree.all(jax.tree.map(np.array_equal, jax.device_get(state), before))


def test_the_state_is_donated_and_lives_where_the_plan_says():
    def kind(array):
        return array.shape, array.dtype.name

    plan = Plan.parse("fsdp=4")
    mesh = plan.mesh()
    state = init_state(CONFIG, 0, mesh)
    like = state_like(CONFIG, mesh)
    assert jax.tree.map(kind, state) == jax.tree.map(kind, like)
    after, _ = stepper(plan)(state, put(0, 0, plan))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state["params"]))
    assert jax.tree.map(lambda a: a.sharding.spec, after) == jax.tree.map(
        lambda s: s.spec, state_shardings(CONFIG, mesh)
    )
    moment = after["optimizer"]["mu"]["embed.weight"]
    assert moment.addressable_shards[0].data.shape == (64, 8)


def test_the_optimizer_state_is_made_of_plain_dicts():
    state = jax.eval_shape(optimizer.init, {"embed.weight": jax.ShapeDtypeStruct((3, 4), jnp.float32)})
    assert {type(node) for node in (state, state["mu"], state["nu"])} == {dict}
    assert sorted(state) == ["count", "mu", "nu"]


def test_offload_sends_what_enters_a_block_to_the_host_and_back():
    """A CPU has one memory and drops the transfers when it compiles, so they are read off the jaxpr."""
    params = init_params(CONFIG, 0)

    def transfers(remat):
        model = functional(CONFIG, remat=remat)
        text = str(jax.make_jaxpr(functools.partial(gradients, model))(params, put(0, 0)))
        return text.count("Host"), text.count("Space.Device")

    there, back = transfers("offload")
    assert there and back and transfers("full") == (0, 0)

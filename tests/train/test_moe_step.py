"""The step of a mixture of experts: equal on every layout, balanced by its losses or its bias, resumed bit for bit."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.train.helpers import MODEL, random_batch
from twinax.layers.moe_config import MoEConfig
from twinax.models.decoder import functional, init_params
from twinax.sharding.plan import Plan
from twinax.sharding.rules import use
from twinax.train import balance
from twinax.train.recipe import OptimizerConfig
from twinax.train.gradients import gradients
from twinax.train.step import init_state, make_step, put_batch, state_shardings

SOFTMAX = MoEConfig(4, 2, 16, balance_loss=0.3, z_loss=0.1)
SIGMOID = MoEConfig(4, 2, 16, shared_experts=1, router="sigmoid", route_scale=1.5, balance_loss=0.2, bias_update=0.02)
MOES = {"softmax": SOFTMAX, "sigmoid": SIGMOID}
ONE = Plan()
QUICK = {"xla_backend_optimization_level": 0}


def config(moe: MoEConfig):
    return dataclasses.replace(MODEL.decoder(64, 16), moe=moe)


@functools.cache
def mean_gradients(name: str, plan: Plan, accumulation: int, remat: str = "none"):
    mesh, model = plan.mesh(), functional(config(MOES[name]), dtype=jnp.float64, remat=remat)
    params = init_params(model.config, 0, dtype=jnp.float64, mesh=mesh)
    batch = put_batch(random_batch(0), 0, accumulation, mesh)
    with use(mesh):
        found = jax.jit(functools.partial(gradients, model), compiler_options=QUICK)(params, batch)
    return jax.device_get(found)


def difference(got, want) -> float:
    """The largest relative difference, by the norm, of any array."""
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    return max(
        float(np.linalg.norm(np.subtract(a, b)) / max(np.linalg.norm(b), np.finfo(np.float64).tiny)) for a, b in pairs
    )


LAYOUTS = [
    ("softmax", "", 4),
    ("sigmoid", "", 2),
    ("softmax", "expert=4", 1),
    ("sigmoid", "expert=4", 2),
    ("softmax", "expert=2,fsdp=2", 2),
    ("sigmoid", "expert=2,tensor=2", 1),
    ("softmax", "expert=2,sequence=2", 1),
    ("sigmoid", "expert=2,data=2,tensor=2", 2),
    ("softmax", "fsdp=2,tensor=2,sequence=2", 2),
]


@pytest.mark.parametrize(("name", "plan", "accumulation"), LAYOUTS)
def test_any_layout_gives_the_gradients_and_statistics_of_one_device_in_float64(name, plan, accumulation):
    with jax.enable_x64(True):
        want = mean_gradients(name, ONE, 1)
        got = mean_gradients(name, Plan.parse(plan), accumulation)
    assert difference(got, want) < 1e-9
    np.testing.assert_array_equal(got[3].tokens_E, want[3].tokens_E)

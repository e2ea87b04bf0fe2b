"""The training step: a pure function of (state, batch).

Shapes: K micro-batches, B rows of one, T tokens.

- The state is `{"params", "optimizer", "step"}`, plain nested dicts of arrays: all that a bitwise resume needs, as the
  batch of a step is a function of the recipe and the step.
- A step whose loss or gradient is not finite leaves the state as it was. So does a batch made for another step, which
  makes it safe to send off the next step before the metrics of this one are read: after a bad step nothing moves.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ..models.config import DecoderConfig
from ..models.decoder import functional, init_params, param_shapes, param_shardings
from ..sharding.plan import ONE_DEVICE, Plan
from ..sharding.rules import use
from . import balance, optimizer
from .data.dataset import Batch
from .gradients import gradients, token_count
from .place import put, put_rows
from .recipe import OptimizerConfig
from .schedules import Schedule

State = dict[str, Any]
DeviceBatch = dict[str, jax.Array]


def init_state(config: DecoderConfig, seed: int, mesh: Mesh, params: dict[str, jax.Array] | None = None) -> State:
    """The state before step 0, created in its place on `mesh`, with fresh parameters or the given ones."""
    params = init_params(config, seed, mesh=mesh) if params is None else params
    shardings = state_shardings(config, mesh)
    moments = jax.jit(optimizer.init, out_shardings=shardings["optimizer"])(params)
    step = put(np.int32(0), shardings["step"])
    return {"params": params, "optimizer": moments, "step": step}


def state_shardings(config: DecoderConfig, mesh: Mesh) -> State:
    """Where each array of the state lives: the optimizer's with their parameters, scalars everywhere."""
    places = param_shardings(config, mesh)
    everywhere = NamedSharding(mesh, PartitionSpec())
    return {
        "params": places,
        "optimizer": {"count": everywhere, "mu": places, "nu": places},
        "step": everywhere,
    }


def state_like(config: DecoderConfig, mesh: Mesh) -> State:
    """The state as shapes, dtypes and shardings, for restoring into."""
    shapes = param_shapes(config)
    scalar = jax.ShapeDtypeStruct((), jnp.int32)
    like = {"params": shapes, "optimizer": jax.eval_shape(optimizer.init, shapes), "step": scalar}
    place = functools.partial(jax.tree.map, lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s))
    return place(like, state_shardings(config, mesh))


def put_batch(batch: Batch, step: int, accumulation: int, mesh: Mesh) -> DeviceBatch:
    """The batch of `step` on the devices, [K, B, T], the rows of each micro-batch cut over them."""
    return {**put_rows(batch, accumulation, mesh), "step": put(np.int32(step), NamedSharding(mesh, PartitionSpec()))}


def make_step(
    config: DecoderConfig,
    optimizer_config: OptimizerConfig,
    schedule: Schedule,
    mesh: Mesh,
    *,
    dtype: Any = jnp.float32,
    remat: str = "none",
    plan: Plan = ONE_DEVICE,
) -> Callable[[State, DeviceBatch], tuple[State, dict[str, jax.Array]]]:
    """The jitted step. It consumes (donates) the state it is given.

    Args:
        config: the model.
        optimizer_config: AdamW's settings.
        schedule: learning rate of a step.
        mesh: where everything lives.
        dtype: of the products.
        remat: what the backward pass computes again.
        plan: how attention crosses devices that share rows, and the order of a pipeline's work; its sizes are `mesh`'s.

    Returns:
        `step(state, batch) -> (state, metrics)`. Metrics are float32 scalars `loss` (mean nats per token), `grad_norm`
        (before clipping), `lr`, `tokens` (weight of the batch), and `ok`: whether the update was applied; with a
        mixture of experts also those of `balance.metrics`.
    """
    model = functional(config, dtype=dtype, remat=remat)

    def step(state: State, batch: DeviceBatch) -> tuple[State, dict[str, jax.Array]]:
        with use(mesh):
            grads, loss, weight, statistics = gradients(model, state["params"], batch, plan)
            norm = optax.tree.norm(grads)
            lr = schedule(state["step"])
            ok = jnp.isfinite(loss) & jnp.isfinite(norm) & (batch["step"] == state["step"])
            params, moments = state["params"], state["optimizer"]
            params, moments = optimizer.update(optimizer_config, params, moments, grads, norm, lr, ok)
            metrics = {"loss": loss, "grad_norm": norm, "lr": lr, "tokens": weight, "ok": ok}
            if config.moe is not None and statistics is not None:
                metrics |= balance.metrics(config.moe, statistics, token_count(batch))
                if config.moe.bias_update:
                    bias_LE = params[balance.BIAS]
                    moved_LE = balance.moved_bias(config.moe, bias_LE, statistics.tokens_E)
                    params = {**params, balance.BIAS: jnp.where(ok, moved_LE, bias_LE)}
            return {"params": params, "optimizer": moments, "step": state["step"] + ok}, metrics

    everywhere = NamedSharding(mesh, PartitionSpec())
    return jax.jit(step, donate_argnums=0, out_shardings=(state_shardings(config, mesh), everywhere))

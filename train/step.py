"""The training step: a pure function of (state, batch).

Shapes: K micro-batches, B rows of one, T tokens.

- The state is `{"params", "optimizer", "step"}`, plain nested dicts of arrays: all that a bitwise resume needs, as the
  batch of a step is a function of the recipe and the step.
- A step whose loss or gradient is not finite leaves the state as it was. So does a batch made for another step, which
  makes it safe to send off the next step before the metrics of this one are read: after a bad step nothing moves.
- Losses and gradients are sums over tokens, divided once by the weight of the whole batch: micro-batches and devices
  change nothing but the order of additions.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ..layers.contexts import PackedContext, in_order
from ..models.config import DecoderConfig
from ..models.decoder import FunctionalDecoder, functional, init_params, param_shapes, param_shardings
from ..sharding.rules import activation_sharding, use
from . import optimizer
from .data.dataset import Batch
from .loss import cross_entropy
from .recipe import OptimizerConfig
from .schedules import Schedule

State = dict[str, Any]
DeviceBatch = dict[str, jax.Array]


def init_state(config: DecoderConfig, seed: int, mesh: Mesh, params: dict[str, jax.Array] | None = None) -> State:
    """The state before step 0, created in its place on `mesh`, with fresh parameters or the given ones."""
    params = init_params(config, seed, mesh=mesh) if params is None else params
    shardings = state_shardings(config, mesh)
    moments = jax.jit(optimizer.init, out_shardings=shardings["optimizer"])(params)
    step = jax.device_put(np.int32(0), shardings["step"])
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
    rows = activation_sharding(("batch",), mesh).spec
    place = NamedSharding(mesh, PartitionSpec(None, *rows))
    arrays = {k: a.reshape(accumulation, -1, a.shape[-1]) for k, a in batch.arrays().items()}
    placed = jax.device_put(arrays, place)
    placed["step"] = jax.device_put(np.int32(step), NamedSharding(mesh, PartitionSpec()))
    return placed


def loss_sums(model: FunctionalDecoder, params: dict[str, jax.Array], batch: DeviceBatch, attention: str = "ring"):
    """Summed loss in nats and summed weight of rows [B, T], on the mesh in use; `attention` as in a plan."""
    # Sums over tokens do not care for their order, so nothing is put back.
    batch = {name: in_order(array, attention) for name, array in batch.items()}
    context = PackedContext(batch["segment_ids_BT"], batch["positions_BT"], attention)
    hidden_BTD, *_ = model.hidden(params, batch["tokens_BT"], context)
    weight_VD = model.unembedding_weight(params)
    return cross_entropy(hidden_BTD, weight_VD, batch["targets_BT"], batch["weights_BT"])


def gradients(model: FunctionalDecoder, params: dict[str, jax.Array], batch: DeviceBatch, attention: str = "ring"):
    """(gradient of the mean loss, mean loss, summed weight) over all micro-batches of [K, B, T]."""
    value_and_grad = jax.value_and_grad(functools.partial(loss_sums, model, attention=attention), has_aux=True)
    rows = {name: array for name, array in batch.items() if array.ndim == 3}

    def add(total, micro):
        return jax.tree.map(jnp.add, total, value_and_grad(params, micro)), None

    if rows["tokens_BT"].shape[0] == 1:
        sums = value_and_grad(params, {name: array[0] for name, array in rows.items()})
    else:
        first = jax.eval_shape(value_and_grad, params, {name: array[0] for name, array in rows.items()})
        sums, _ = jax.lax.scan(add, jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), first), rows)
    (loss_sum, weight), grads = sums
    scale = 1 / jnp.where(weight == 0, 1, weight)
    return jax.tree.map(lambda g: g * scale, grads), loss_sum * scale, weight


def make_step(
    config: DecoderConfig,
    optimizer_config: OptimizerConfig,
    schedule: Schedule,
    mesh: Mesh,
    *,
    dtype: Any = jnp.float32,
    remat: str = "none",
    attention: str = "ring",
) -> Callable[[State, DeviceBatch], tuple[State, dict[str, jax.Array]]]:
    """The jitted step. It consumes (donates) the state it is given.

    Args:
        config: the model.
        optimizer_config: AdamW's settings.
        schedule: learning rate of a step.
        mesh: where everything lives.
        dtype: of the products.
        remat: what the backward pass computes again.
        attention: how attention crosses devices that share rows, as in a plan.

    Returns:
        `step(state, batch) -> (state, metrics)`. Metrics are float32 scalars `loss` (mean nats per token), `grad_norm`
        (before clipping), `lr`, `tokens` (weight of the batch), and `ok`: whether the update was applied.
    """
    model = functional(config, dtype=dtype, remat=remat)

    def step(state: State, batch: DeviceBatch) -> tuple[State, dict[str, jax.Array]]:
        with use(mesh):
            grads, loss, weight = gradients(model, state["params"], batch, attention)
            norm = optax.tree.norm(grads)
            lr = schedule(state["step"])
            ok = jnp.isfinite(loss) & jnp.isfinite(norm) & (batch["step"] == state["step"])
            params, moments = state["params"], state["optimizer"]
            params, moments = optimizer.update(optimizer_config, params, moments, grads, norm, lr, ok)
            new = {"params": params, "optimizer": moments, "step": state["step"] + ok}
            return new, {"loss": loss, "grad_norm": norm, "lr": lr, "tokens": weight, "ok": ok}

    everywhere = NamedSharding(mesh, PartitionSpec())
    return jax.jit(step, donate_argnums=0, out_shardings=(state_shardings(config, mesh), everywhere))

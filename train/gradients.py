"""The loss of a batch and its gradients, on one device or a mesh, whole or through a pipeline.

Shapes: K micro-batches, B rows of one, T tokens, L layers, E experts.

- Losses and gradients are sums over tokens, divided once by the weight of the whole batch: micro-batches, devices and a
  pipeline's pieces change nothing but the order of additions.
- With a mixture of experts the gradient is also that of its penalties (`balance`). They depend on the load of the whole
  step. Where the first backward pass begins before the last forward pass has ended (several micro-batches, or a 1F1B
  pipeline) and there is a load-balancing loss, all of them first go forward once to count it: a third more work.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from ..layers.contexts import PackedContext, in_order
from ..layers.moe import Statistics
from ..models.decoder import FunctionalDecoder
from ..sharding import pipeline
from ..sharding.plan import ONE_DEVICE, Plan
from . import balance
from .loss import Logits, cross_entropy

Params = dict[str, jax.Array]
Rows = dict[str, jax.Array]


def loss_sums(
    model: FunctionalDecoder, params: Params, batch: Rows, plan: Plan = ONE_DEVICE
) -> tuple[jax.Array, jax.Array]:
    """Summed loss in nats and summed weight of rows [B, T], on the mesh in use."""
    return _forward(model, plan, params, _in_order(batch, plan))[0]


def gradients(
    model: FunctionalDecoder, params: Params, batch: Rows, plan: Plan = ONE_DEVICE
) -> tuple[Params, jax.Array, jax.Array, Statistics | None]:
    """(gradient, mean loss, summed weight, router's statistics or None) over all micro-batches of [K, B, T]."""
    moe = model.config.moe if model.config.layers_with("moe") else None  # all of whose layers may be dense
    rows = {name: _in_order(array, plan) for name, array in batch.items() if array.ndim == 3}
    one_by_one = plan.stage > 1 and plan.schedule == "1f1b"
    K = rows["tokens_BT"].shape[0]
    load_LE = None
    if moe is not None and moe.balance_loss and (K > 1 or one_by_one):
        load_LE = _load(model, plan, params, rows)

    def penalty(statistics: Statistics) -> jax.Array:
        assert moe is not None
        load = statistics.tokens_E if load_LE is None else load_LE
        # Divided by the weight below, as the loss is.
        return jnp.sum(rows["weights_BT"]) * balance.penalty(moe, statistics, load, token_count(batch))

    find = _one_by_one if one_by_one else _whole

    @partial(jax.jit, inline=True)  # traced once, for its shapes and in the loop
    def value_and_grad(params: Params, micro: Rows) -> tuple[Any, Params]:
        return find(model, plan, None if moe is None else penalty, params, micro)

    def add(total: Any, micro: Rows) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, value_and_grad(params, micro)), None

    first = {name: array[0] for name, array in rows.items()}
    if K == 1:
        sums = value_and_grad(params, first)
    else:
        like = jax.eval_shape(value_and_grad, params, first)
        sums, _ = jax.lax.scan(add, jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), like), rows)
    ((loss_sum, weight), statistics), grads = sums
    scale = 1 / jnp.where(weight == 0, 1, weight)
    return jax.tree.map(lambda g: g * scale, grads), loss_sum * scale, weight, statistics


def token_count(batch: Rows) -> jax.Array:
    """Tokens of a batch, padding left out."""
    return jnp.sum(batch["segment_ids_BT"] != 0)


def _in_order(tree: Any, plan: Plan) -> Any:
    """Tokens as attention wants them. Sums over tokens do not care for their order, so nothing is put back."""
    return jax.tree.map(lambda x: in_order(x, plan.attention), tree)


def _context(batch: Rows, plan: Plan) -> PackedContext:
    return PackedContext(batch["segment_ids_BT"], batch["positions_BT"], plan.attention)


def _loss(model: FunctionalDecoder, params: Params, hidden_BTD: jax.Array, batch: Rows) -> tuple[jax.Array, jax.Array]:
    logits = Logits(model.config.logit_scale, model.config.logit_softcap)
    weight_VD = model.unembedding_weight(params)
    return cross_entropy(hidden_BTD, weight_VD, batch["targets_BT"], batch["weights_BT"], logits=logits)


def _forward(model: FunctionalDecoder, plan: Plan, params: Params, batch: Rows) -> tuple[Any, Statistics | None]:
    """((loss, weight) sums, statistics) of rows in order."""
    hidden_BTD, _, statistics = model.hidden(params, batch["tokens_BT"], _context(batch, plan), plan=plan)
    return _loss(model, params, hidden_BTD, batch), statistics


def _load(model: FunctionalDecoder, plan: Plan, params: Params, rows: Rows) -> jax.Array:
    """How many tokens of all micro-batches each expert gets, int32 [L, E]."""

    def add(load_LE: jax.Array, micro: Rows) -> tuple[jax.Array, None]:
        statistics = _forward(model, plan, params, micro)[1]
        assert statistics is not None
        return load_LE + statistics.tokens_E, None

    assert model.config.moe is not None
    start = jnp.zeros((len(model.config.layers_with("moe")), model.config.moe.num_experts), jnp.int32)
    return jax.lax.scan(add, start, rows)[0]


Penalty = Callable[[Statistics], jax.Array] | None


def _whole(model: FunctionalDecoder, plan: Plan, penalty: Penalty, params: Params, batch: Rows) -> tuple[Any, Params]:
    """(((loss, weight) sums, statistics), gradients of the summed objective) of one micro-batch, by differentiation."""

    def objective(params: Params) -> tuple[jax.Array, Any]:
        (loss_sum, weight), statistics = _forward(model, plan, params, batch)
        total = loss_sum if penalty is None or statistics is None else loss_sum + penalty(statistics)
        return total, ((loss_sum, weight), statistics)

    (_, found), grads = jax.value_and_grad(objective, has_aux=True)(params)
    return found, grads


def _one_by_one(
    model: FunctionalDecoder, plan: Plan, penalty: Penalty, params: Params, batch: Rows
) -> tuple[Any, Params]:
    """The same by a 1F1B pipeline, which takes its own gradients."""
    outside, layers = model.split(params)

    def first(outside: Params, piece: Rows) -> jax.Array:
        return model.bind(outside).begin(piece["tokens_BT"], _context(piece, plan))[0]

    def stage(weights: Params, x: jax.Array, piece: Rows) -> tuple[jax.Array, Any]:
        context = _context(piece, plan)
        return model.stage(weights, x, (model.ropes(context), context))

    def last(outside: Params, x: jax.Array, piece: Rows) -> tuple[jax.Array, jax.Array]:
        return _loss(model, outside, model.bind(outside).final_norm(x), piece)

    pieces = pipeline.cut(batch, plan.pieces)
    found, statistics, d_outside, d_layers = pipeline.run_1f1b(
        first, stage, last, outside, layers, model.layer_axes, pieces, penalty, stages=plan.stage
    )
    return (found, statistics), model.join(d_outside, d_layers)

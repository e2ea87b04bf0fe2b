"""Routers: which experts a token takes, and with what weights.

Shapes: N tokens, D width, E experts, K experts of one token.

Everything here is float32 or wider, whatever the model computes in: rounding decides which experts a token gets.
"""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from ..sharding.rules import gather
from .linear import linear
from .moe_config import MoEConfig
from .rows import row_sum


class Router(nnx.Module):
    """The parameters of a router: `weight` [E, D], and for "sigmoid" `bias` [E], which balances the load.

    The bias gets no gradient; `train` moves it (DeepSeek-V3, arXiv:2412.19437; Wang et al. 2024, arXiv:2408.15664).
    `logit_bias` [E] is a plain bias of the logits, where the config wants one.
    """

    def __init__(self, width: int, config: MoEConfig, *, param_dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs):
        draw = jax.random.normal(rngs.params(), (config.num_experts, width), param_dtype)
        self.weight = nnx.Param(draw * jnp.asarray(width**-0.5, param_dtype), axes=("routes", "embed"))
        self.bias = (
            nnx.Param(jnp.zeros((config.num_experts,), param_dtype), axes=("routes",))
            if config.router == "sigmoid"
            else None
        )
        self.logit_bias = (
            nnx.Param(jnp.zeros((config.num_experts,), param_dtype), axes=("routes",)) if config.router_bias else None
        )

    def weights(self, dtype: jnp.dtype) -> "RouterWeights":
        """The parameters as a device computes with them, in `dtype`."""

        def whole(param: nnx.Param | None) -> jax.Array | None:
            return None if param is None else gather(param[...].astype(dtype), param.axes)

        return RouterWeights(whole(self.weight), whole(self.bias), whole(self.logit_bias))


class RouterWeights(NamedTuple):
    """See `Router`: [E, D], [E] or None, [E] or None."""

    weight_ED: Any
    bias_E: jax.Array | None
    logit_bias_E: jax.Array | None


@partial(
    jax.tree_util.register_dataclass, data_fields=["expert_NK", "weight_NK", "probability_NE", "z_N"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class Routes:
    """Where tokens go.

    Attributes:
        expert_NK: int32, different experts, the one with the highest score first.
        weight_NK: how much of each expert's output the token takes.
        probability_NE: the router's scores as shares that sum to one; what the load-balancing loss pushes.
        z_N: square of the log-sum-exp of the logits, the z-loss of ST-MoE (Zoph et al. 2022, arXiv:2202.08906).
    """

    expert_NK: jax.Array
    weight_NK: jax.Array
    probability_NE: jax.Array
    z_N: jax.Array


def route(config: MoEConfig, x_ND: jax.Array, weights: RouterWeights) -> Routes:
    """Chooses experts. `weights` are float32 or wider; results have that dtype.

    - "softmax" (Mixtral, arXiv:2401.04088): a softmax over all experts, the K largest.
    - "sigmoid" (DeepSeek-V3, arXiv:2412.19437): a score in (0, 1) for each; the K with the largest score plus bias
      are taken, and weighted by their scores alone.
    - With groups, only experts of a token's best groups are candidates (DeepSeek-V2, arXiv:2405.04434).
    """
    weight_ED, bias_E, logit_bias_E = weights
    logits_NE = linear(x_ND.astype(weight_ED.dtype), weight_ED, logit_bias_E)
    if config.router == "softmax":
        top_N1 = jax.lax.stop_gradient(jnp.max(logits_NE, axis=-1, keepdims=True))
        raised_NE = jnp.exp(logits_NE - top_N1)
        scores_NE = probability_NE = raised_NE / row_sum(raised_NE)
    else:
        scores_NE = jax.nn.sigmoid(logits_NE)
        probability_NE = scores_NE / row_sum(scores_NE)
    order_NE = scores_NE if bias_E is None else scores_NE + bias_E
    order_NE = _best_groups(config, jax.lax.stop_gradient(order_NE))
    _, expert_NK = jax.lax.top_k(order_NE, config.experts_per_token)
    weight_NK = jnp.take_along_axis(scores_NE, expert_NK, axis=-1)
    if config.normalize:
        weight_NK = weight_NK / row_sum(weight_NK)
    z_N = jnp.square(jax.nn.logsumexp(logits_NE, axis=-1))
    return Routes(expert_NK, config.route_scale * weight_NK, probability_NE, z_N)


def _best_groups(config: MoEConfig, order_NE: jax.Array) -> jax.Array:
    """`order_NE`, minus infinity for experts of all but a token's best groups."""
    if config.groups == 1:
        return order_NE
    order_NGE = order_NE.reshape(len(order_NE), config.groups, -1)
    group_NG = jnp.sum(jax.lax.top_k(order_NGE, config.group_top)[0], axis=-1)
    chosen_NM = jax.lax.top_k(group_NG, config.groups_per_token)[1]
    kept_NG = jnp.any(chosen_NM[:, :, None] == jnp.arange(config.groups), axis=1)
    return jnp.where(kept_NG[:, :, None], order_NGE, -jnp.inf).reshape(order_NE.shape)

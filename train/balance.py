"""Keeping the experts of a mixture evenly loaded, and its router's numbers small.

Shapes: L layers, E experts. N tokens of a whole step (all devices, all micro-batches; padding left out), K experts of
each, f_e = load_e / (K N) the share of them that expert e got, P_e the mean of the router's score for it, as a share.

- Load-balancing loss: `balance_loss * E * sum_e f_e P_e`, for each layer; 1 when even, E / K at the worst. f and P are
  of the whole step: within a smaller piece of text the experts may specialise (Qiu et al. 2025, "Demons in the Detail",
  arXiv:2501.11873). f passes no gradient.
- z-loss: `z_loss * mean logsumexp(logits)^2`, for each layer (ST-MoE, Zoph et al. 2022, arXiv:2202.08906).
- Bias: after a step each expert's bias moves by `bias_update`, up if it got less than the mean, down if it got more
  (DeepSeek-V3, arXiv:2412.19437). It has no gradient, no decay, and so nothing from the optimizer.

The losses of the layers are added up.
"""

import jax
import jax.numpy as jnp

from ..layers.moe import Statistics
from ..layers.moe_config import MoEConfig

BIAS = "blocks.moe.router.bias"


def penalty(config: MoEConfig, part: Statistics, load_LE: jax.Array, tokens: jax.Array) -> jax.Array:
    """The part of both losses that a micro-batch has: over all of them it adds up to the losses of the step.

    Args:
        part: of the micro-batch, stacked. load_LE: tokens of each expert in the whole step. tokens: N.
    """
    share_LE, tokens = _shares(config, load_LE, tokens, part)
    balance = config.num_experts * jnp.sum(share_LE * part.probability_E)
    return (config.balance_loss * balance + config.z_loss * jnp.sum(part.z)) / tokens


def metrics(config: MoEConfig, whole: Statistics, tokens: jax.Array) -> dict[str, jax.Array]:
    """Of a step: both losses before their coefficients, as means over layers, and the load of the busiest expert of any
    layer over the mean load."""
    share_LE, tokens = _shares(config, whole.tokens_E, tokens, whole)
    return {
        "balance_loss": config.num_experts * jnp.mean(jnp.sum(share_LE * whole.probability_E, axis=-1)) / tokens,
        "z_loss": jnp.mean(whole.z) / tokens,
        "load_imbalance": config.num_experts * jnp.max(share_LE),
    }


def moved_bias(config: MoEConfig, bias_LE: jax.Array, load_LE: jax.Array) -> jax.Array:
    """The router's bias after a step with this load."""
    load_LE = load_LE.astype(bias_LE.dtype)
    return bias_LE + config.bias_update * jnp.sign(jnp.mean(load_LE, axis=-1, keepdims=True) - load_LE)


def _shares(config: MoEConfig, load_LE: jax.Array, tokens: jax.Array, like: Statistics) -> tuple[jax.Array, jax.Array]:
    """f, and N as a number to divide by, in the dtype of the statistics."""
    dtype = like.probability_E.dtype
    tokens = jnp.maximum(tokens, 1).astype(dtype)
    return load_LE.astype(dtype) / (config.experts_per_token * tokens), tokens

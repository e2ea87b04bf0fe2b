"""AdamW with decoupled weight decay and clipping by the global norm.

Its state is a plain nested dict, `{"count": int32, "mu": {name: array}, "nu": {name: array}}`, so a checkpoint names
its arrays as the model does; `mu` and `nu` are float32 and live where their parameters live.
"""

import jax
import jax.numpy as jnp

from .recipe import OptimizerConfig

Arrays = dict[str, jax.Array]


def decayed(name: str) -> bool:
    """Whether weight decay applies to the parameter: to matrices, not to norms, biases, and a state's own constants."""
    module, _, kind = name.rpartition(".")
    return kind not in ("bias", "dt_bias", "A_log", "D") and not module.endswith("norm")


def init(params: Arrays) -> dict:
    """The state before the first step; run it under `jit` with shardings to create it in place."""
    zeros = {name: jnp.zeros(p.shape, jnp.promote_types(p.dtype, jnp.float32)) for name, p in params.items()}
    return {"count": jnp.zeros((), jnp.int32), "mu": zeros, "nu": dict(zeros)}


def update(config: OptimizerConfig, params: Arrays, state: dict, grads: Arrays, norm, lr, ok) -> tuple[Arrays, dict]:
    """One step of AdamW, all in place when the caller donates.

    Args:
        params, state: before the step.
        grads: gradient of the mean loss, float32.
        norm: the global norm of `grads`, which the caller has for its own use.
        lr: learning rate of this step.
        ok: a bool; where it is False everything stays as it is.

    Returns:
        Parameters and state after the step.
    """
    scale = jnp.minimum(1.0, config.clip_norm / norm) if config.clip_norm > 0 else 1.0
    count = state["count"] + 1
    mu_bias, nu_bias = 1 - config.beta1**count, 1 - config.beta2**count
    new_params, new_mu, new_nu = {}, {}, {}
    for name, p in params.items():
        g, mu, nu = grads[name] * scale, state["mu"][name], state["nu"][name]
        mu = jnp.where(ok, config.beta1 * mu + (1 - config.beta1) * g, mu)
        nu = jnp.where(ok, config.beta2 * nu + (1 - config.beta2) * g * g, nu)
        # The barrier makes the parameter wait for the new moments. Without it XLA computes all three from the old
        # ones, which it must then copy first, as the new ones take their place.
        mu, nu = jax.lax.optimization_barrier((mu, nu))
        direction = (mu / mu_bias) / (jnp.sqrt(nu / nu_bias) + config.eps)
        decay = config.weight_decay * p if decayed(name) else 0
        new_params[name] = jnp.where(ok, p - lr * (direction + decay), p).astype(p.dtype)
        new_mu[name], new_nu[name] = mu, nu
    return new_params, {"count": jnp.where(ok, count, state["count"]), "mu": new_mu, "nu": new_nu}

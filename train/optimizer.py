"""AdamW with decoupled weight decay and clipping by the global norm.

Its state is a plain nested dict, `{"count": int32, "mu": {name: array}, "nu": {name: array}}`, so a checkpoint names
its arrays as the model does; `mu` and `nu` are float32 and live where their parameters live.
"""

import jax
import jax.numpy as jnp
import optax

from .recipe import OptimizerConfig

Arrays = dict[str, jax.Array]


def decayed(name: str) -> bool:
    """Whether weight decay applies to the parameter: to matrices, not to norms and biases."""
    module, _, kind = name.rpartition(".")
    return kind != "bias" and not module.endswith("norm")


def init(params: Arrays) -> dict:
    """The state before the first step; run it under `jit` with shardings to create it in place."""
    return dict(_adam(OptimizerConfig()).init(params)._asdict())


def update(config: OptimizerConfig, params: Arrays, state: dict, grads: Arrays, norm, lr) -> tuple[Arrays, dict]:
    """One step of AdamW.

    Args:
        params, state: before the step.
        grads: gradient of the mean loss, float32.
        norm: the global norm of `grads` (`optax.tree.norm`), which the caller has for its own use.
        lr: learning rate of this step.

    Returns:
        Parameters and state after the step.
    """
    if config.clip_norm > 0:
        # optax's own clipping would compute the norm once more.
        scale = jnp.minimum(1.0, config.clip_norm / norm)
        grads = jax.tree.map(lambda g: g * scale, grads)
    updates, adam = _adam(config).update(grads, optax.ScaleByAdamState(**state), params)
    decay = optax.add_decayed_weights(config.weight_decay, {name: decayed(name) for name in params})
    updates, _ = decay.update(updates, decay.init(params), params)
    params = {name: (p - lr * updates[name]).astype(p.dtype) for name, p in params.items()}
    return params, dict(adam._asdict())


def _adam(config: OptimizerConfig) -> optax.GradientTransformation:
    return optax.scale_by_adam(config.beta1, config.beta2, config.eps)

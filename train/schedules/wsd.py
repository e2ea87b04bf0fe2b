"""Warm-up, stable, decay: linear warm-up, the peak, and at the end a decay by one minus the square root.

With w warm-up and d decay steps of n: `peak * (s + 1) / w` below w, `peak` until n - d, then
`peak * (r + (1 - r) * (1 - sqrt((s - (n - d)) / d)))`. Until the decay begins nothing depends on n, so a run can be
prolonged from a checkpoint of its stable part. The square root is from Hägele et al. 2024 (arXiv 2405.18392).
"""

import jax.numpy as jnp

from . import Schedule, ScheduleConfig


def make(config: ScheduleConfig, peak: float, steps: int) -> Schedule:
    warmup, decay, ratio = config.warmup(steps), config.decay(steps), config.final_ratio
    if warmup + decay > steps:
        raise ValueError(
            f"schedule: {warmup} warm-up steps and {decay} decay steps do not fit into steps={steps}; lower "
            "schedule.warmup_steps or schedule.decay_steps, or train longer."
        )

    def learning_rate(step):
        rising = (step + 1) / max(warmup, 1)
        progress = jnp.clip((step - (steps - decay)) / max(decay, 1), 0, 1)
        falling = ratio + (1 - ratio) * (1 - jnp.sqrt(progress))
        return jnp.asarray(peak * jnp.where(step < warmup, rising, falling), jnp.float32)

    return learning_rate

"""Linear warm-up, then half a cosine from the peak down to the final learning rate.

With w warm-up steps of n: `peak * (s + 1) / w` below step w, and from there
`peak * (r + (1 - r) * (1 + cos(pi * (s - w) / (n - w))) / 2)`.
"""

import jax.numpy as jnp

from . import Schedule, ScheduleConfig


def make(config: ScheduleConfig, peak: float, steps: int) -> Schedule:
    if config.decay_steps is not None:
        raise ValueError(
            f"schedule.decay_steps={config.decay_steps} has no meaning for the cosine schedule, which decays all "
            "along; leave it out, or set schedule.name to 'wsd'."
        )
    warmup, ratio = config.warmup(steps), config.final_ratio

    def learning_rate(step):
        rising = (step + 1) / max(warmup, 1)
        progress = jnp.clip((step - warmup) / max(steps - warmup, 1), 0, 1)
        falling = ratio + (1 - ratio) * (1 + jnp.cos(jnp.pi * progress)) / 2
        return jnp.asarray(peak * jnp.where(step < warmup, rising, falling), jnp.float32)

    return learning_rate

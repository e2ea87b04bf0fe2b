"""Loss on held-out text: the same rows every time, so that evaluations compare."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ..models.config import DecoderConfig
from ..models.decoder import functional
from ..sharding.plan import ONE_DEVICE, Plan
from ..sharding.rules import use
from .data.dataset import Dataset
from .gradients import loss_sums
from .place import part_here
from .step import DeviceBatch, put_batch


def make_evaluate(
    config: DecoderConfig,
    dataset: Dataset,
    batch_size: int,
    batches: int,
    mesh: Mesh,
    *,
    dtype: Any = jnp.float32,
    plan: Plan = ONE_DEVICE,
) -> Callable[[dict[str, jax.Array]], float]:
    """A function from parameters to the mean loss, nats per token, over the first `batches` of `dataset` (0: all)."""
    model = functional(config, dtype=dtype)

    @jax.jit
    def sums(params: dict[str, jax.Array], batch: DeviceBatch) -> Any:
        rows = {name: array[0] for name, array in batch.items() if array.ndim == 3}
        with use(mesh):
            return loss_sums(model, params, rows, plan)

    count, part = batches or None, part_here(mesh, batch_size, 1)

    def evaluate(params: dict[str, jax.Array]) -> float:
        found = []
        for batch in itertools.islice(dataset.one_pass(batch_size, part), count):
            found.append(sums(params, put_batch(batch, 0, 1, mesh)))
        losses, weights = zip(*jax.device_get(found), strict=True)
        return math.fsum(map(float, losses)) / max(math.fsum(map(float, weights)), 1.0)

    return evaluate

"""Whether products with the weights first, which are quick on a CPU, round alike in batches of all sizes of the engine.

They must, as a request's numbers may not depend on the batch that its tokens came in. They do on the machines and with
the sizes that `step_sizes` was made for; on others it is tried, before the engine's programs are traced.
"""

from collections.abc import Collection

import jax
import jax.numpy as jnp
import numpy as np

from ..layers.linear import product, weights_first
from ..models.config import DecoderConfig
from ..models.parameters import BLOCKS, param_shapes

MOST_OUTPUTS = 2048  # of a weight that is tried: with more of them the same kernels are used


def products_of(config: DecoderConfig) -> set[tuple[int, int]]:
    """(outputs, inputs) of the model's weights, those with very many outputs cut off."""
    shapes = [x.shape[1:] for name, x in param_shapes(config).items() if name.startswith(BLOCKS) and x.ndim == 3]
    return {
        (min(outputs, MOST_OUTPUTS), inputs) for outputs, inputs in [*shapes, (config.vocab_size, config.hidden_size)]
    }


def rounds_alike(counts: Collection[int], shapes: Collection[tuple[int, int]]) -> bool:
    """Whether rows of float32 have the same bits in products of so many rows each (one row alone is not asked)."""
    rng = np.random.default_rng(0)
    sizes = sorted(count for count in counts if count > 1)
    weights = [jnp.asarray(rng.random(shape, np.float32) - 0.5) for shape in shapes]
    rows = [rng.random((max(sizes, default=2), inputs), np.float32) - 0.5 for _, inputs in shapes]

    def products(rows: list[list[jax.Array]], weights: list[jax.Array]) -> list[list[jax.Array]]:
        return [[product(x, weight) for x in own] for own, weight in zip(rows, weights, strict=True)]

    with weights_first():
        # One program: each takes 0.1 s to compile, whatever is in it.
        found = jax.device_get(jax.jit(products)([[x[:size] for size in sizes] for x in rows], weights))
    return all(np.array_equal(one, own[-1][: len(one)]) for own in found for one in own[:-1])

"""Token embedding. Shapes: V vocabulary, D width."""

import jax
import jax.numpy as jnp
from flax import nnx

from ..sharding.rules import gather


class Embedding(nnx.Module):
    """Rows of a table, [...] int32 to [..., D]. Tokens must lie in [0, V): the edges check that, a gather can't."""

    def __init__(self, vocab_size: int, width: int, *, param_dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs):
        draw = jax.random.normal(rngs.params(), (vocab_size, width), param_dtype)
        self.weight = nnx.Param(draw * jnp.asarray(0.02, param_dtype), axes=("vocab", "embed"))

    def __call__(self, tokens: jax.Array, dtype: jnp.dtype) -> jax.Array:
        return gather(self.weight[...], self.weight.axes)[tokens].astype(dtype)

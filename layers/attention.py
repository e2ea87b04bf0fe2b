"""Grouped-query attention (Ainslie et al., 2023, arXiv:2305.13245) with rotary positions.

Shapes: H heads, K key-value heads, D head size, E model width.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from .linear import Linear
from .rope import rotate


class Attention(nnx.Module):
    """Projects [..., E] to heads, lets the context mix them, and projects back.

    It keeps one key and one value of K x D numbers for each token; where, is the context's business.
    """

    def __init__(
        self,
        width: int,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        bias: bool = False,
        out_scale: float = 1.0,
        param_dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.head_dim = head_dim
        common = {"bias": bias, "param_dtype": param_dtype, "rngs": rngs}
        self.query = Linear(width, num_heads * head_dim, axes=("heads", "embed"), **common)
        self.key = Linear(width, num_kv_heads * head_dim, axes=("kv_heads", "embed"), **common)
        self.value = Linear(width, num_kv_heads * head_dim, axes=("kv_heads", "embed"), **common)
        self.out = Linear(num_heads * head_dim, width, axes=("embed", "heads"), scale=out_scale, **common)

    def __call__(
        self, x: jax.Array, rope: tuple[jax.Array, jax.Array], context: Any, cache: Any, layer: Any
    ) -> tuple[jax.Array, Any]:
        """[..., E] and the cache to [..., E] and the cache; `rope` holds cosines and sines of the positions."""
        split = (*x.shape[:-1], -1, self.head_dim)
        q = rotate(self.query(x).reshape(split), *rope)
        k = rotate(self.key(x).reshape(split), *rope)
        v = self.value(x).reshape(split)
        with jax.named_scope("attend"):  # so that a profile, and the planner, can tell it from the projections
            mixed, cache = context.attend(q, k, v, cache, layer)
        return self.out(mixed.reshape(*x.shape[:-1], -1)), cache

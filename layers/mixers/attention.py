"""Grouped-query attention (Ainslie et al., 2023, arXiv:2305.13245) with rotary positions.

Shapes: H heads, K key-value heads, D head size, E model width.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ..linear import Linear
from ..norm import RMSNorm
from ..quantization_config import Quantization
from ..rope import rotate


@dataclasses.dataclass(frozen=True)
class Mixing:
    """How values are mixed, beside who sees whom: what a context's `attend` passes on to its kernel.

    Attributes:
        window: keys that a query sees, its own the last; None: all before it.
        scale: of the scores; None: 1 / sqrt(D).
        softcap: bends the scaled scores to `c * tanh(score / c)`; None: not.
    """

    window: int | None = None
    scale: float | None = None
    softcap: float | None = None


class Attention(nnx.Module):
    """Projects [..., E] to heads, lets the context mix them, and projects back.

    It keeps one key and one value of K x D numbers for each token; where, is the context's business.

    Args:
        bias, out_bias: of the projections to heads, and of the one back.
        norms: RMSNorms of queries and keys before they are turned: "head" (each head by itself), "all" (all heads of a
            token together) or None. norm_options: of these.
        sinks: learns one more logit a head, without a value.
        scale, softcap: see `Mixing`. quantization: of the weights, if they are kept quantised.
    """

    def __init__(
        self,
        width: int,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        bias: bool = False,
        out_bias: bool = False,
        norms: str | None = None,
        norm_options: dict[str, Any] | None = None,
        sinks: bool = False,
        scale: float | None = None,
        softcap: float | None = None,
        out_scale: float = 1.0,
        quantization: Quantization | None = None,
        param_dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.head_dim, self.norms, self.scale, self.softcap = head_dim, norms, scale, softcap
        quantization = quantization and quantization.of("linear")
        common = {"quantization": quantization, "param_dtype": param_dtype, "rngs": rngs}
        self.query = Linear(width, num_heads * head_dim, axes=("heads", "embed"), bias=bias, **common)
        self.key = Linear(width, num_kv_heads * head_dim, axes=("kv_heads", "embed"), bias=bias, **common)
        self.value = Linear(width, num_kv_heads * head_dim, axes=("kv_heads", "embed"), bias=bias, **common)
        out_axes = ("embed", "heads")
        self.out = Linear(num_heads * head_dim, width, axes=out_axes, scale=out_scale, bias=out_bias, **common)
        self.query_norm = self._norm(num_heads, "heads", norm_options, param_dtype)
        self.key_norm = self._norm(num_kv_heads, "kv_heads", norm_options, param_dtype)
        self.sinks = nnx.Param(jnp.zeros((num_heads,), param_dtype), axes=("heads",)) if sinks else None

    def __call__(
        self,
        x: jax.Array,
        rope: tuple[jax.Array, jax.Array] | None,
        context: Any,
        cache: Any,
        layer: Any,
        window: int | None = None,
    ) -> tuple[jax.Array, Any]:
        """[..., E] and the cache to [..., E] and the cache.

        Args:
            rope: cosines and sines of the positions; None leaves heads as they are.
        """
        q = self._heads(self.query(x), self.query_norm, rope)
        k = self._heads(self.key(x), self.key_norm, rope)
        v = self._heads(self.value(x), None, None)
        sinks_H = None if self.sinks is None else self.sinks[...]
        with jax.named_scope("attend"):  # so that a profile, and the planner, can tell it from the projections
            mixed, cache = context.attend(
                q, k, v, cache, layer, Mixing(window, self.scale, self.softcap), sinks_H=sinks_H
            )
        return self.out(mixed.reshape(*x.shape[:-1], -1)), cache

    def _norm(self, heads: int, axis: str, options: dict[str, Any] | None, param_dtype: jnp.dtype) -> RMSNorm | None:
        if self.norms is None:
            return None
        options = {**(options or {}), "param_dtype": param_dtype}
        if self.norms == "head":
            return RMSNorm(self.head_dim, axis=None, **options)
        return RMSNorm(heads * self.head_dim, axis=axis, **options)

    def _heads(self, x: jax.Array, norm: RMSNorm | None, rope: tuple[jax.Array, jax.Array] | None) -> jax.Array:
        if norm is not None and self.norms == "all":
            x = norm(x)
        x = x.reshape(*x.shape[:-1], -1, self.head_dim)
        if norm is not None and self.norms == "head":
            x = norm(x)
        return x if rope is None else rotate(x, *rope)

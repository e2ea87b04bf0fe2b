"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434).

Shapes: E model width, H heads, N and P the parts of a head that are not turned and turned, V size of a value,
R size of the latent that keys and values come from.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ..linear import Linear
from ..mixer_config import LatentAttentionConfig
from ..norm import RMSNorm
from ..quantization_config import Quantization
from ..rope import rotate
from .attention import Mixing


class LatentAttention(nnx.Module):
    """Projects [..., E] to queries and a latent, lets the context mix, and projects back.

    It keeps R + P numbers for each token: the latent, and the key of the turned part, which all heads share.

    Args:
        bias: of the projections to latents, and of the one back. norm_options: of the latents' RMSNorms.
        scale: of the scores. quantization: of the weights, if they are kept quantised.
    """

    def __init__(
        self,
        width: int,
        config: LatentAttentionConfig,
        *,
        num_heads: int,
        scale: float,
        bias: bool = False,
        norm_options: dict[str, Any] | None = None,
        out_scale: float = 1.0,
        quantization: Quantization | None = None,
        param_dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.config, self.num_heads, self.scale = config, num_heads, scale
        common = {
            "quantization": quantization and quantization.of("linear"),
            "param_dtype": param_dtype,
            "rngs": rngs,
        }
        norm = {**(norm_options or {}), "axis": None, "param_dtype": param_dtype}
        of_query = num_heads * (config.nope_dim + config.rope_dim)
        of_kv = num_heads * (config.nope_dim + config.value_dim)
        rank = config.query_rank
        # A latent is whole on every device: its axis has no name where weights make it.
        self.query_down = None if rank is None else Linear(width, rank, axes=(None, "embed"), bias=bias, **common)
        self.query_norm = None if rank is None else RMSNorm(rank, **norm)
        self.query = Linear(rank or width, of_query, axes=("heads", "embed"), **common)
        self.kv_down = Linear(width, config.kv_rank + config.rope_dim, axes=(None, "embed"), bias=bias, **common)
        self.kv_norm = RMSNorm(config.kv_rank, **norm)
        self.kv = Linear(config.kv_rank, of_kv, axes=("heads", "embed"), **common)
        self.out = Linear(
            num_heads * config.value_dim, width, axes=("embed", "heads"), scale=out_scale, bias=bias, **common
        )

    def __call__(
        self,
        x: jax.Array,
        rope: tuple[jax.Array, jax.Array] | None,
        context: Any,
        cache: Any,
        layer: Any,
        window: int | None = None,
    ) -> tuple[jax.Array, Any]:
        """[..., E] and the cache to [..., E] and the cache."""
        config = self.config
        latent = x if self.query_down is None or self.query_norm is None else self.query_norm(self.query_down(x))
        q = self.query(latent).reshape(*x.shape[:-1], self.num_heads, -1)
        latent, turned = jnp.split(self.kv_down(x), [config.kv_rank], axis=-1)
        latent = self.kv_norm(latent)
        q_still, q_turned = jnp.split(q, [config.nope_dim], axis=-1)
        q_turned, turned = self._turn(q_turned, rope), self._turn(turned[..., None, :], rope)
        weight_HCR = self.kv.whole_weight(x.dtype).reshape(self.num_heads, -1, config.kv_rank)
        up_HNR, up_HVR = jnp.split(weight_HCR, [config.nope_dim], axis=1)
        with jax.named_scope("attend"):
            mixed, cache = context.attend_latent(
                (q_still, q_turned), latent, turned, (up_HNR, up_HVR), cache, layer, Mixing(window, self.scale)
            )
        return self.out(mixed.reshape(*x.shape[:-1], -1)), cache

    def _turn(self, x: jax.Array, rope: tuple[jax.Array, jax.Array] | None) -> jax.Array:
        if rope is None:
            return x
        if self.config.interleaved:
            # Into the order of `rotate`; queries and keys alike, so that their products are the same.
            x = jnp.swapaxes(x.reshape(*x.shape[:-1], -1, 2), -1, -2).reshape(x.shape)
        return rotate(x, *rope)

"""Normalisation of the last axis. Shapes: D its size. Statistics are float32 or wider."""

import jax
import jax.numpy as jnp
from flax import nnx

from ..sharding.rules import gather
from .rows import row_mean


class RMSNorm(nnx.Module):
    """Scales [..., D] to unit root mean square, then by a learned weight (arXiv:1910.07467).

    Args:
        offset: one is added to the weight, which starts at zero (Gemma).
        groups: equal parts of [D], each scaled by itself.
        axis: the logical axis of the weight.
    """

    def __init__(
        self,
        width: int,
        *,
        epsilon: float,
        offset: bool = False,
        groups: int = 1,
        axis: str | None = "embed",
        param_dtype: jnp.dtype = jnp.float32,
    ):
        self.weight = nnx.Param((jnp.zeros if offset else jnp.ones)((width,), param_dtype), axes=(axis,))
        self.epsilon, self.offset, self.groups = epsilon, offset, groups

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        if self.groups > 1:
            wide = wide.reshape(*x.shape[:-1], self.groups, -1)
        scaled = wide * jax.lax.rsqrt(row_mean(jnp.square(wide)) + self.epsilon)
        scaled = scaled.reshape(x.shape)
        weight = gather(self.weight[...], self.weight.axes)
        if self.offset:
            return (scaled * (1 + weight.astype(wide.dtype))).astype(x.dtype)
        # Hugging Face rounds to the compute dtype before the weight; the order is kept, so that bfloat16 agrees too.
        return scaled.astype(x.dtype) * weight.astype(x.dtype)


class LayerNorm(nnx.Module):
    """Scales [..., D] to mean 0 and variance 1, then by a learned weight and bias (arXiv:1607.06450)."""

    def __init__(self, width: int, *, epsilon: float, param_dtype: jnp.dtype = jnp.float32):
        self.weight = nnx.Param(jnp.ones((width,), param_dtype), axes=("embed",))
        self.bias = nnx.Param(jnp.zeros((width,), param_dtype), axes=("embed",))
        self.epsilon = epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        centred = wide - row_mean(wide)
        scaled = centred * jax.lax.rsqrt(row_mean(jnp.square(centred)) + self.epsilon)
        weight, bias = (gather(p[...], p.axes).astype(wide.dtype) for p in (self.weight, self.bias))
        return (scaled * weight + bias).astype(x.dtype)
